"""Multi-scale renders against a plain transcription of the official pipeline, on the same weights, text and draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import interpolate

from ltx_batch import Condition, RenderRequest, load_renderer
from ltx_batch.errors import CheckpointError
from ltx_batch.model.decode import tone_map
from ltx_batch.model.noise import row_noise
from ltx_batch.model.upsample import adain
from ltx_batch.renderer import LtxRenderer
from tests.tiny_checkpoint import write_tiny_checkpoint

PLAIN = {"guidance_scale": 1, "stg_scale": 0, "rescaling_scale": 1, "skip_block_list": [42]}
DISTILLED = {
    "pipeline_type": "multi-scale",
    "decode_noise_scale": 0.025,
    "first_pass": {"timesteps": [1.0, 0.9937, 0.9875, 0.9812, 0.9750, 0.9094, 0.7250], **PLAIN},
    "second_pass": {"timesteps": [0.9094, 0.7250, 0.4219], **PLAIN, "tone_map_compression_ratio": 0.6},
}
DEV = {
    "pipeline_type": "multi-scale",
    "decode_noise_scale": 0.025,
    "stg_mode": "stg_av",
    "first_pass": {
        "guidance_scale": [1, 6, 8, 1],
        "stg_scale": [0, 4, 4, 1],
        "rescaling_scale": [1, 0.5, 0.5, 1],
        "guidance_timesteps": [1.0, 0.9933, 0.9850, 0.6],
        "skip_block_list": [[], [0, 1], [1], [1]],
        "num_inference_steps": 12,
        "skip_final_inference_steps": 2,
        "cfg_star_rescale": True,
    },
    "second_pass": {
        "guidance_scale": [1],
        "stg_scale": [1],
        "rescaling_scale": [1],
        "guidance_timesteps": [1.0],
        "skip_block_list": [1],
        "num_inference_steps": 12,
        "skip_initial_inference_steps": 7,
        "cfg_star_rescale": True,
    },
}
REQUEST = RenderRequest(prompt="a red circle", negative_prompt="blurry", height=120, width=190, num_frames=9, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def load(folder: Path, tmp_path: Path, config: dict[str, Any]) -> LtxRenderer:
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(config))
    return load_renderer(str(folder), pipeline_config=str(file), precision="fp32", device="cpu")


@pytest.mark.parametrize(
    "config", [DISTILLED, DEV, {**DISTILLED, "stochastic_sampling": True}], ids=["7+3", "dev", "stochastic"]
)
def test_both_passes_and_the_frames_are_those_of_the_official_pipeline(
    folder: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    renderer = load(folder, tmp_path, config)
    first, second, frames = official(renderer, config)
    found = renderer.trace(REQUEST)
    assert found.second_pass is not None
    for ours, theirs in ((found.first_pass, first), (found.second_pass, second)):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert found.frames.shape == (1, 3, 9, 120, 190)
    assert (found.frames - frames).abs().max() < 1e-5
    assert found.frames.std() > 0.01, "a flat clip says nothing"


@torch.no_grad()
def official(renderer: LtxRenderer, config: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """LTXMultiScalePipeline of pipeline_ltx_video.py for one clip without conditions, and the crop of inference.py."""
    model, noise = renderer._pipeline, row_noise(REQUEST.seed)
    height, width = 128, 192
    low = (64, 96)  # int(side * 0.6666666), less what is over a multiple of 32: 85 -> 64, 127 -> 96
    first = official_pass(renderer, config, "pass1", config["first_pass"], low, None)
    vae = model.vae
    mean, deviation = vae.latents_mean.view(1, -1, 1, 1, 1), vae.latents_std.view(1, -1, 1, 1, 1)
    raised = (model.latent_upsampler(first * deviation + mean) - mean) / deviation
    for channel in range(raised.shape[1]):
        to_deviation, to_mean = torch.std_mean(first[0, channel])
        of_deviation, of_mean = torch.std_mean(raised[0, channel])
        raised[0, channel] = (raised[0, channel] - of_mean) / of_deviation * to_deviation + to_mean
    second = official_pass(renderer, config, "pass2", config["second_pass"], (128, 192), raised)
    decoded = second * (1 - 0.025) + noise("decode", tuple(second.shape)) * 0.025
    scale = 0.75 * config["second_pass"].get("tone_map_compression_ratio", 0.0)
    decoded = decoded * (1 - 0.8 * scale * torch.sigmoid(4 * scale * (decoded.abs() - 1)))
    video = vae.decode(decoded * deviation + mean, torch.tensor([0.05]), return_dict=False)[0]
    video = (video / 2 + 0.5).clamp(0, 1)
    flat = interpolate(video[0].transpose(0, 1), size=(height, width), mode="bilinear", align_corners=False)
    return first, second, flat.transpose(0, 1)[None, :, :, 4:124, 1:191]


def official_pass(
    renderer: LtxRenderer,
    config: dict[str, Any],
    name: str,
    one: dict[str, Any],
    size: tuple[int, int],
    begin: torch.Tensor | None,
) -> torch.Tensor:
    model, noise = renderer._pipeline, row_noise(REQUEST.seed)
    rows, columns = size[0] // 32, size[1] // 32
    timesteps = torch.tensor(one["timesteps"]) if "timesteps" in one else schedule(one)
    grid = torch.meshgrid(
        torch.tensor([0.0, 1.0]), torch.arange(rows) * 32.0, torch.arange(columns) * 32.0, indexing="ij"
    )
    coords = torch.stack(grid).flatten(1)[None]
    coords[:, 0] *= 1.0 / REQUEST.frame_rate
    tokens = noise(f"{name}.init", (1, 2 * rows * columns, 8))
    if begin is not None:
        tokens = timesteps[0] * tokens + (1 - timesteps[0]) * begin.flatten(2).transpose(1, 2)
    words, away = model.encode(REQUEST.prompt), model.encode(REQUEST.negative_prompt)

    def ask(text: Any, blocks: list[int]) -> torch.Tensor:
        layers = [model.transformer.transformer_blocks[block].attn1 for block in blocks]
        handles = [layer.register_forward_hook(values_only, with_kwargs=True) for layer in layers]
        answer = model.transformer(
            tokens, text.embeds, timestep=t.view(1, 1) * 1000, encoder_attention_mask=text.mask, video_coords=coords
        ).sample
        for handle in handles:
            handle.remove()
        return answer

    for step, t in enumerate(timesteps):
        at = table_index(one, t)
        scale, stg, share = (pick(one[key], at) for key in ("guidance_scale", "stg_scale", "rescaling_scale"))
        blocks = one["skip_block_list"]
        blocks = blocks[at] if blocks and isinstance(blocks[0], list) else blocks
        plain = velocity = ask(words, [])
        if scale > 1:
            negative = ask(away, [])
            if one.get("cfg_star_rescale"):
                negative = negative * (plain * negative).sum() / ((negative**2).sum() + 1e-8)
            velocity = negative + scale * (plain - negative)
        if stg > 0:
            velocity = velocity + stg * (plain - ask(words, blocks))
            if share != 1:
                velocity = velocity * (share * plain.std() / velocity.std() + 1 - share)
        following = timesteps[step + 1] if step + 1 < len(timesteps) else torch.tensor(0.0)
        if config.get("stochastic_sampling"):
            clean = tokens - t * velocity
            tokens = (1 - following) * clean + following * noise(f"{name}.stochastic.{step}", tuple(tokens.shape))
        else:
            tokens = tokens - (t - following) * velocity
    return tokens.transpose(1, 2).unflatten(2, (2, rows, columns))


def values_only(layer: Any, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
    return layer.to_out[0](layer.to_v(kwargs["hidden_states"]))


def schedule(one: dict[str, Any]) -> torch.Tensor:
    """rf.py, linear_quadratic_schedule, and retrieve_timesteps's cut."""
    steps, half = one["num_inference_steps"], one["num_inference_steps"] // 2
    over = half - 0.025 * steps
    square = over / (half * (steps - half) ** 2)
    slope = 0.025 / half - 2 * over / (steps - half) ** 2
    falls = [i * 0.025 / half for i in range(half)]
    falls += [square * i**2 + slope * i + square * half**2 for i in range(half, steps)]
    first, last = one.get("skip_initial_inference_steps", 0), one.get("skip_final_inference_steps", 0)
    return torch.tensor([1 - fall for fall in falls])[first : steps - last]


def table_index(one: dict[str, Any], t: torch.Tensor) -> int:
    starts = one.get("guidance_timesteps", [1.0])
    return next((index for index, start in enumerate(starts) if start <= t), len(starts) - 1)


def pick(table: Any, at: int) -> float:
    return table[at] if isinstance(table, list) else table


IMAGE = np.random.default_rng(0).integers(0, 256, (1, 120, 190, 3), dtype=np.uint8)


@pytest.mark.parametrize("conditions", [(), (Condition(IMAGE), Condition(IMAGE, 5, 0.7))], ids=["text", "conditioned"])
def test_a_row_of_a_batch_equals_the_row_alone(folder: Path, tmp_path: Path, conditions: tuple[Condition, ...]) -> None:
    renderer = load(folder, tmp_path, DEV)
    prompts = ("a red circle", "a blue square", "")
    requests = [
        RenderRequest(prompt=prompt or "x", height=128, width=128, num_frames=9, seed=seed, conditions=conditions)
        for seed, prompt in enumerate(prompts)
    ]
    together = renderer.render(requests)
    for request, clip in zip(requests, together, strict=True):
        alone = renderer.render([request])[0].frames.astype(int)
        assert abs(clip.frames.astype(int) - alone).max() <= 1
    assert abs(together[0].frames.astype(int) - together[1].frames.astype(int)).max() > 1


def test_conditions_are_encoded_anew_at_the_size_of_each_pass(folder: Path, tmp_path: Path) -> None:
    renderer = load(folder, tmp_path, DISTILLED)
    request = RenderRequest(prompt="x", height=128, width=192, num_frames=9, image_cond_noise_scale=0.0)
    pixels = torch.from_numpy(IMAGE).permute(0, 3, 1, 2).float()[None].transpose(1, 2) / 127.5 - 1
    pixels = interpolate(pixels[0].transpose(0, 1), size=(128, 192)).transpose(0, 1)[None]
    drawn: dict[str, tuple[int, ...]] = {}

    def noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        drawn[name] = shape
        return row_noise(1)(name, shape)

    found = renderer.trace(request, conditions=[(pixels, 0, 1.0)], noise=noise)
    vae = renderer._pipeline.vae
    for name, latents, size in (("pass1", found.first_pass, (64, 96)), ("pass2", found.second_pass, (128, 192))):
        media = interpolate(pixels[:, :, 0], size=size, mode="bilinear", align_corners=False)[:, :, None]
        said = vae.encode(media).latent_dist
        expected = said.mean + said.std * row_noise(1)(f"{name}.vae_sample.0", tuple(said.mean.shape))
        expected = (expected - vae.latents_mean.view(1, -1, 1, 1, 1)) / vae.latents_std.view(1, -1, 1, 1, 1)
        assert latents is not None
        torch.testing.assert_close(latents[:, :, :1], expected, rtol=1e-4, atol=1e-4)
    assert drawn["pass1.init"] == (1, 2 * 2 * 3, 8)
    assert drawn["pass2.init"] == (1, 2 * 4 * 6, 8)
    assert drawn["decode"] == (1, 8, 2, 4, 6)


def test_no_text_encoder_is_asked_where_embeddings_are_given(folder: Path, tmp_path: Path) -> None:
    renderer = load(folder, tmp_path, DEV)
    words, away = renderer._pipeline.encode("a red circle"), renderer._pipeline.encode("blurry")
    expected = renderer.trace(REQUEST)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the text encoder was asked")

    renderer._pipeline.encode = refuse  # type: ignore[method-assign]
    found = renderer.trace(
        replace(REQUEST, prompt=""),
        prompt_embeds=words.embeds,
        prompt_attention_mask=words.mask,
        negative_prompt_embeds=away.embeds,
        negative_prompt_attention_mask=away.mask,
    )
    assert torch.equal(found.frames, expected.frames)


BLACK = -torch.ones(1, 3, 1, 64, 96)


def text(*, prompt: Any) -> dict[str, Any]:
    return {"prompt_embeds": prompt, "prompt_attention_mask": torch.ones(1, 4)}


def still(*, pixels: Any = BLACK, frame: Any = 0, strength: Any = 1.0) -> dict[str, Any]:
    return {"conditions": [(pixels, frame, strength)]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_embeds": torch.zeros(1, 4, 16)}, "prompt_embeds and prompt_attention_mask must be given together"),
        ({"prompt_embeds": torch.zeros(4, 16), "prompt_attention_mask": torch.ones(4)}, r"found \[4, 16\] and \[4\]"),
        ({"conditions": [(torch.zeros(1, 3, 4, 64, 96), 0, 1.0)]}, r"must be \[1, 3, 8k \+ 1, H, W\]"),
        ({"conditions": [(torch.zeros(1, 3, 9, 64, 96), 8, 1.0)]}, "longer than the clip's 9"),
        (text(prompt=torch.zeros(1, 4, 15)), r"prompt_embeds must have 16 channels, .* found 15"),
        (text(prompt=np.zeros((1, 4, 16))), r"prompt_embeds must be a torch tensor, found numpy\.ndarray"),
        (text(prompt=torch.zeros(1, 4, 16, dtype=torch.int64)), "must hold floating-point numbers, found torch.int64"),
        (still(frame=-1), r"conditions\[0\]: start_frame must be a frame of the clip, 0 to 8, found -1"),
        (still(frame=9), "0 to 8, found 9"),
        (still(frame=0.5), "0 to 8, found 0.5"),
        (still(strength=7), r"conditions\[0\]: strength must be in 0\.\.1, found 7"),
        (still(strength=float("nan")), "strength must be in 0..1, found nan"),
        (still(pixels=torch.full((1, 3, 1, 64, 96), 255.0)), r"pixels must be in \[-1, 1\], found 255 to 255"),
        (still(pixels=np.zeros((1, 3, 1, 64, 96))), r"pixels must be a torch tensor, found numpy\.ndarray"),
        ({"conditions": [torch.zeros(1, 3, 1, 64, 96)]}, r"must be \(pixels, start_frame, strength\), found Tensor"),
        ({"noise": lambda name, shape: np.zeros(shape)}, r"noise\('pass1.init', \(1, .* a torch tensor, found numpy"),
        ({"noise": lambda name, shape: torch.zeros(1, 2, 3)}, r"shape \(1, 12, 8\), found \(1, 2, 3\)"),
    ],
)
def test_tensors_that_do_not_fit_are_told(folder: Path, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder, tmp_path, DISTILLED).trace(REQUEST, **given)


def test_a_sequence_starts_where_its_latents_can(folder: Path, tmp_path: Path) -> None:
    long, frames = replace(REQUEST, num_frames=25), torch.zeros(1, 3, 9, 64, 96)
    renderer = load(folder, tmp_path, DISTILLED)
    with pytest.raises(ValueError, match=r"start_frame of a sequence must be a multiple of 8, found 3"):
        renderer.trace(long, conditions=[(frames, 3, 1.0)])
    renderer.trace(long, conditions=[(frames[:, :, :1], 3, 1.0)])


def test_given_texts_must_be_of_one_size_where_both_are_needed(folder: Path, tmp_path: Path) -> None:
    short = text(prompt=torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match=r"as large as prompt_embeds, \[1, 4, 16\], found \[1, 256, 16\]"):
        load(folder, tmp_path, DEV).trace(REQUEST, **short)
    load(folder, tmp_path, DISTILLED).trace(REQUEST, **short)
    load(folder, tmp_path, DISTILLED).trace(REQUEST, **text(prompt=torch.zeros(1, 4, 16).double()))


def test_draws_of_another_precision_are_taken(folder: Path, tmp_path: Path) -> None:
    renderer, draws = load(folder, tmp_path, DISTILLED), row_noise(REQUEST.seed)
    found = renderer.trace(REQUEST, noise=lambda name, shape: draws(name, shape).double())
    assert torch.equal(found.frames, renderer.trace(REQUEST).frames)


@pytest.mark.parametrize("compression", [0.0, 0.3, 1.0])
def test_tones_are_mapped_as_officially(compression: float) -> None:
    latents = torch.randn(1, 8, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    scale = compression * 0.75
    expected = latents * (1.0 - 0.8 * scale * torch.sigmoid(4.0 * scale * (latents.abs() - 1.0)))
    torch.testing.assert_close(tone_map(latents, compression), expected)


def test_statistics_follow_the_small_latents_row_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    large, small = (torch.randn(2, 3, 2, n, n, generator=generator) * 2 + 1 for n in (4, 2))
    found = adain(large, small * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1, 1))
    for row, factor in enumerate((1.0, 5.0)):
        torch.testing.assert_close(found[row].flatten(1).std(1), factor * small[row].flatten(1).std(1))
        torch.testing.assert_close(found[row].flatten(1).mean(1), factor * small[row].flatten(1).mean(1))


def test_a_checkpoint_without_upsampler_or_block_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="names block 2, and this transformer has blocks 0 to 1"):
        load(folder, tmp_path, {"stg_scale": 1, "skip_block_list": [2]})
    bare = write_tiny_checkpoint(tmp_path / "bare")
    for file in (bare / "latent_upsampler").iterdir():
        file.unlink()
    (bare / "latent_upsampler").rmdir()
    with pytest.raises(CheckpointError, match="takes a latent upsampler"):
        load(bare, tmp_path, DISTILLED)
