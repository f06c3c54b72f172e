"""The renderer as users see it, on a tiny random checkpoint: requests in, clips out."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from ltx_batch import Condition, RenderRequest, load_renderer
from ltx_batch.clip import Clip
from ltx_batch.errors import CheckpointError, InvalidRow, JobError, MediaError, NotFinite, PrecisionError
from ltx_batch.job import VideoSpec
from ltx_batch.media import write_video
from ltx_batch.model import pipeline
from ltx_batch.model.decode import decode_latents, decode_row
from ltx_batch.model.noise import Noise, row_noise
from ltx_batch.model.plan import Plan
from ltx_batch.renderer import LtxRenderer
from tests.tiny_checkpoint import write_tiny_checkpoint

CONFIG = "timesteps: [1.0, 0.975, 0.725, 0.4219]\nguidance_scale: 1\n"
REQUEST = RenderRequest(prompt="a red circle", height=64, width=96, num_frames=17, seed=7)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), pipeline_config=CONFIG)


@pytest.fixture(scope="module")
def renderer(tiny: Path) -> Iterator[LtxRenderer]:
    loaded = load_renderer(str(tiny), device="cpu")
    yield loaded
    loaded.close()


def pictures(count: int = 1, *, seed: int = 0, height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def one(renderer: LtxRenderer, **changes: Any) -> Clip:
    return renderer.render([replace(REQUEST, **changes)])[0]


def far(a: Clip, b: Clip) -> bool:
    """Whether two clips differ by more than rounding: random weights give low contrast, so a little is a lot."""
    return bool((a.frames != b.frames).mean() > 0.05)


# what comes out


@pytest.mark.parametrize(("height", "width", "num_frames"), [(64, 96, 17), (60, 90, 12), (34, 32, 1), (32, 64, 2)])
def test_a_clip_has_the_size_that_was_asked_for(
    renderer: LtxRenderer, height: int, width: int, num_frames: int
) -> None:
    clip = one(renderer, height=height, width=width, num_frames=num_frames, frame_rate=24.0)
    assert clip.frames.shape == (num_frames, height, width, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.frame_rate == 24.0
    assert clip.frames.std() > 1


def test_a_padded_clip_is_the_middle_of_the_padded_one(renderer: LtxRenderer) -> None:
    whole, cropped = (
        one(renderer, height=64, width=96, num_frames=17),
        one(renderer, height=60, width=90, num_frames=12),
    )
    assert np.array_equal(cropped.frames, whole.frames[:12, 2:62, 3:93])


def test_a_clip_says_what_ran_and_how_long(renderer: LtxRenderer) -> None:
    clip = one(renderer, conditions=(Condition(pictures()),))
    assert set(clip.timings) == {"text", "condition", "denoise", "decode"}
    assert all(seconds >= 0 for seconds in clip.timings.values())
    assert clip.timings["denoise"] > 0
    assert clip.ran["precision"] == "fp32" and clip.ran["dtype"] == "float32" and clip.ran["device"] == "cpu"
    assert clip.ran["tiling"] is False and clip.ran["degraded"] is False and clip.ran["batch_size"] == 1
    assert clip.peak_bytes is None


def test_weights_are_counted(renderer: LtxRenderer, tiny: Path) -> None:
    assert (renderer.device, renderer.precision) == ("cpu", "fp32")
    for part, name in {
        "transformer": "diffusion_pytorch_model",
        "vae": "diffusion_pytorch_model",
        "text_encoder": "model",
    }.items():
        on_disk = (tiny / part / f"{name}.safetensors").stat().st_size
        assert 0.9 * on_disk < renderer.weights_bytes[part] <= on_disk


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a blue square"},
        {"seed": 8},
        {"frame_rate": 8.0},
        {"timesteps": (1.0, 0.5)},
        {"num_inference_steps": 3},
        {"guidance_scale": 6.0},
        {"decode_noise_scale": 0.9},
        {"decode_timestep": 0.9},
        {"conditions": (Condition(pictures()),)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_in_the_key_changes_the_pixels(renderer: LtxRenderer, changes: dict[str, Any]) -> None:
    assert not np.array_equal(one(renderer).frames, one(renderer, **changes).frames)


def test_the_negative_prompt_counts_only_with_guidance(renderer: LtxRenderer) -> None:
    plain, other = one(renderer), one(renderer, negative_prompt="sharp and steady")
    assert np.array_equal(plain.frames, other.frames)
    guided, other = (one(renderer, guidance_scale=6.0, negative_prompt=text) for text in ("blurry", "sharp and steady"))
    assert not np.array_equal(guided.frames, other.frames)


def test_image_cond_noise_counts_only_with_conditions(renderer: LtxRenderer) -> None:
    assert np.array_equal(one(renderer).frames, one(renderer, image_cond_noise_scale=0.9).frames)
    conditions = (Condition(pictures()),)
    still, stirred = (one(renderer, conditions=conditions, image_cond_noise_scale=scale) for scale in (0.0, 0.9))
    assert not np.array_equal(still.frames, stirred.frames)


# the same pixels again


def test_another_renderer_gives_the_same_bits(renderer: LtxRenderer, tiny: Path) -> None:
    request = replace(
        REQUEST, guidance_scale=3.0, conditions=(Condition(pictures()), Condition(pictures(seed=1), 9, 0.5))
    )
    one(renderer, prompt="something else first")
    again = load_renderer(str(tiny), device="cpu")
    assert renderer.render([request])[0].frames_sha256() == again.render([request])[0].frames_sha256()


def test_another_process_gives_the_same_bits(renderer: LtxRenderer, tiny: Path) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[2])); from ltx_batch import *;"
        "r = RenderRequest(prompt='a red circle', height=64, width=96, num_frames=17, seed=7);"
        "print(load_renderer(sys.argv[1], device='cpu').render([r])[0].frames_sha256())"
    )
    command = [sys.executable, "-c", code, str(tiny), str(torch.get_num_threads())]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == one(renderer).frames_sha256()


def test_rendering_leaves_the_global_generators_alone(renderer: LtxRenderer) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = one(renderer, conditions=(Condition(pictures(), 3, 0.5),))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert one(renderer, conditions=(Condition(pictures(), 3, 0.5),)).frames_sha256() == first.frames_sha256()


# batches


def layouts() -> dict[str, list[tuple[Condition, ...]]]:
    """Conditions of three rows that share a batch key, by name."""

    def rows(*places: tuple[int, int, float]) -> list[tuple[Condition, ...]]:
        return [
            tuple(
                Condition(pictures(count, seed=10 * row + i), start, strength)
                for i, (count, start, strength) in enumerate(places)
            )
            for row in range(3)
        ]

    return {
        "text": rows(),
        "first frame": rows((1, 0, 1.0)),
        "later frame, soft": rows((1, 5, 0.7)),
        "sequences": rows((9, 0, 1.0), (17, 8, 0.9)),
        "unequal media": [
            (Condition(pictures(1, seed=1)),),
            (Condition(pictures(9, seed=2)),),
            (Condition(pictures(1, seed=3)),),
        ],
    }


def before_rounding(
    renderer: LtxRenderer, requests: list[RenderRequest], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Latents and float video of each request, which are told apart by their seeds."""
    found: dict[float, tuple[torch.Tensor, torch.Tensor]] = {}

    def spy(vae: Any, latents: torch.Tensor, plan: Plan, noise: Noise, slices: Any) -> Iterator[torch.Tensor]:
        video = decode_latents(vae, latents, plan, noise)
        found[noise("which", (1,)).item()] = (latents, video)
        return decode_row(vae, latents, plan, noise, slices)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "decode_row", spy)
        renderer.render(requests)
    return [found[row_noise(request.seed)("which", (1,)).item()] for request in requests]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("layout", layouts())
def test_a_row_of_a_batch_equals_the_row_alone(
    renderer: LtxRenderer, layout: str, guidance_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ("a", "a blue square", "many words " * 9)
    requests = [
        replace(REQUEST, prompt=prompt, negative_prompt=prompt[::-1], seed=seed, num_frames=25, conditions=conditions)
        for seed, (prompt, conditions) in enumerate(zip(prompts, layouts()[layout], strict=True))
    ]
    requests = [replace(request, guidance_scale=guidance_scale) for request in requests]
    together = before_rounding(renderer, requests, monkeypatch)
    alone = [before_rounding(renderer, [request], monkeypatch)[0] for request in requests]
    for (latents, video), (latents_alone, video_alone) in zip(together, alone, strict=True):
        assert (latents - latents_alone).abs().max() < 1e-5
        assert (video - video_alone).abs().max() < 1e-5
    assert (alone[0][0] - alone[1][0]).abs().max() > 0.1, "rows that are all alike prove nothing"


def test_a_batch_keeps_its_order(renderer: LtxRenderer) -> None:
    requests = [
        replace(REQUEST, seed=seed, conditions=(Condition(pictures(9 if seed % 2 else 1, seed=seed)),))
        for seed in range(4)
    ]
    for clip, request in zip(renderer.render(requests), requests, strict=True):
        # The given first frames come through the VAE alike, whatever else is in the batch.
        nearest = renderer.render([request])[0].frames
        assert np.abs(clip.frames.astype(int) - nearest).max() <= 1
        assert clip.ran["batch_size"] == 4


def test_a_mixed_batch_is_refused(renderer: LtxRenderer) -> None:
    with pytest.raises(ValueError, match="share their batch_key"):
        renderer.render([REQUEST, replace(REQUEST, num_frames=25)])
    assert renderer.render([]) == []


def test_each_text_is_encoded_once(tiny: Path) -> None:
    renderer = load_renderer(str(tiny), device="cpu")
    requests = [replace(REQUEST, seed=seed, guidance_scale=2.0, negative_prompt="bad") for seed in (1, 2)]
    (clip, _), (again,) = renderer.render(requests), renderer.render([replace(requests[0], prompt="  a red circle ")])
    told = "on the device: all parts share one memory"
    assert clip.ran["text"] == {"encoder": 2, "memory": 2, "place": told}
    assert again.ran["text"] == {"memory": 2, "place": told}


# conditions


def test_arrays_files_and_uris_of_one_picture_give_one_clip(renderer: LtxRenderer, tmp_path: Path) -> None:
    pixels = pictures()
    Image.fromarray(pixels[0]).save(tmp_path / "first.png")
    fsspec.filesystem("memory").pipe_file("/media/first.png", (tmp_path / "first.png").read_bytes())
    sources = (pixels, tmp_path / "first.png", str(tmp_path / "first.png"), "memory://media/first.png")
    found = [one(renderer, conditions=(Condition(source),)).frames_sha256() for source in sources]
    assert len(set(found)) == 1


def test_a_video_conditions_with_its_frames(renderer: LtxRenderer, tmp_path: Path) -> None:
    write_video(Clip(pictures(20), 24.0), tmp_path / "moving.mp4", VideoSpec(crf=0), metadata={})
    moving = one(renderer, conditions=(Condition(tmp_path / "moving.mp4"),))
    still = one(renderer, conditions=(Condition(pictures(1)),))
    assert far(moving, still)


@pytest.mark.parametrize(
    ("condition", "error", "message"),
    [
        (Condition("nowhere.png"), MediaError, "nowhere.png"),
        (Condition("memory://nowhere/x.png"), MediaError, "does not exist"),
        (
            Condition(np.zeros((64, 96, 3), np.uint8)),
            MediaError,
            r"uint8 RGB \[F, H, W, 3\], found uint8 \[64, 96, 3\]",
        ),
        (Condition(np.zeros((1, 64, 96, 3), np.float32)), MediaError, "found float32"),
        (Condition(np.zeros((0, 64, 96, 3), np.uint8)), MediaError, r"\[0, 64, 96, 3\]"),
        (Condition(pictures(9), 4), InvalidRow, "must start at a multiple of 8, found frame 4"),
        (Condition(pictures(), 17), InvalidRow, "the clip has frames 0 to 16"),
    ],
)
def test_bad_conditions_are_told(
    renderer: LtxRenderer, condition: Condition, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        one(renderer, conditions=(condition,))


# precisions


def test_bf16_is_near_fp32(renderer: LtxRenderer, tiny: Path) -> None:
    half = load_renderer(str(tiny), precision="bf16", device="cpu")
    assert half.weights_bytes["transformer"] == renderer.weights_bytes["transformer"] // 2
    clip, reference = half.render([REQUEST])[0], one(renderer)
    assert clip.ran["dtype"] == "bfloat16"
    error = np.abs(clip.frames.astype(float) - reference.frames).mean()
    assert 0 < error < 0.1 * reference.frames.std()


def test_latents_that_are_not_finite_are_an_error(tiny: Path) -> None:
    broken = load_renderer(str(tiny), device="cpu")
    broken._pipeline.transformer.proj_out.bias.fill_(float("inf"))
    with pytest.raises(NotFinite, match="not finite after pass1"):
        one(broken)


# loading


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int8", "hadamard_group": 32}, PrecisionError, "must be one of 0, 64, 256"),
        ({"precision": "half"}, PrecisionError, "unknown precision"),
        ({"placement": "sharded"}, JobError, "wants several GPUs in one worker: set worker.num_gpus"),
        ({"placement": "moon"}, JobError, "unknown placement 'moon'; what works: auto, resident, offload, sharded"),
        ({"upsampler": "x"}, CheckpointError, "no weights at x"),
        ({"condition_preprocess": "some"}, JobError, "unknown condition_preprocess 'some'; what works: none, official"),
        ({"pipeline_config": "nowhere.yaml"}, JobError, "no pipeline config at nowhere.yaml"),
        ({"device": "tpu"}, JobError, "what works: auto, cpu, cuda"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(
    tiny: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_renderer(str(tiny), **options)


def test_a_named_pipeline_config_replaces_the_folders_own(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("timesteps: [1.0]\nguidance_scale: 2\n")
    renderer = load_renderer(str(tiny), device="cpu", pipeline_config=str(tmp_path / "short.yaml"))
    assert renderer.plan(REQUEST).passes[0].sigmas == (1.0,)
    assert renderer.plan(REQUEST).needs_negative


def test_another_folder_can_give_the_text_encoder(renderer: LtxRenderer, tiny: Path, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", seed=1)
    mixed = load_renderer(str(tiny), device="cpu", text_encoder=str(other))
    assert not np.array_equal(one(mixed).frames, one(renderer).frames)


def test_a_closed_renderer_gives_its_memory_back(tiny: Path) -> None:
    renderer = load_renderer(str(tiny), device="cpu")
    weight = weakref.ref(renderer._pipeline.transformer.proj_in.weight)
    renderer.close()
    assert weight() is None
