"""Official single files: they load as their folder does and render the same bits; wrong ones say what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.errors import CheckpointError
from ltx_batch.model.checkpoint import load_checkpoint
from ltx_batch.renderer import checkpoint_fingerprint, load_planner
from tests.official_file import ALLOWED, RELEASES, res, write_official_file, write_official_upsampler
from tests.tiny_checkpoint import write_tiny_checkpoint

# 32 heads, as every release has: a file without a config is known by its shapes alone.
TRANSFORMER = {"num_attention_heads": 32, "attention_head_dim": 2, "cross_attention_dim": 64}
REQUEST = RenderRequest(prompt="a red circle", height=64, width=96, num_frames=9, num_inference_steps=2, seed=3)
MULTI_SCALE = """
pipeline_type: multi-scale
first_pass: {timesteps: [1.0, 0.725], guidance_scale: 1, stg_scale: 0, rescaling_scale: 1}
second_pass: {timesteps: [0.725, 0.4219], guidance_scale: 1, stg_scale: 0, rescaling_scale: 1}
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each release, with the VAE that it had."""
    made = {}
    for name, release in RELEASES.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = write_tiny_checkpoint(
            folder, transformer=TRANSFORMER, vae=release.vae, scheduler=release.scheduler, seed=5
        )
    return made


@pytest.fixture(scope="module")
def files(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    target = tmp_path_factory.mktemp("files")
    return {name: write_official_file(folder, target / f"{name}.safetensors", name) for name, folder in folders.items()}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("with_config", [True, False], ids=["config", "shapes alone"])
def test_a_file_renders_bit_for_bit_as_its_folder(
    folders: dict[str, Path], tmp_path: Path, release: str, with_config: bool
) -> None:
    folder = folders[release]
    file = write_official_file(folder, tmp_path / "official.safetensors", release, with_config=with_config)
    renderers = [
        load_renderer(str(folder), device="cpu"),
        load_renderer(str(file), text_encoder=str(folder), device="cpu"),
    ]
    plans = [renderer.plan(REQUEST) for renderer in renderers]
    assert plans[0] == plans[1] == load_planner(str(file))(REQUEST)
    clips = [renderer.render([REQUEST])[0] for renderer in renderers]
    assert clips[0].frames_sha256() == clips[1].frames_sha256()
    assert renderers[0].weights_bytes.keys() - {"latent_upsampler"} == renderers[1].weights_bytes.keys()


def test_multi_scale_takes_the_upscalers_file(folders: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    config = tmp_path / "multi.yaml"
    config.write_text(MULTI_SCALE)
    folder, file = folders["0.9.8"], files["0.9.8"]
    request = RenderRequest(prompt="a", height=96, width=96, num_frames=9)
    upsamplers = [
        write_official_upsampler(folder, tmp_path / f"{with_config}.safetensors", with_config=with_config)
        for with_config in (True, False)
    ]
    renderers = [
        load_renderer(str(folder), pipeline_config=str(config), device="cpu"),
        *(
            load_renderer(
                str(file), pipeline_config=str(config), upsampler=str(place), text_encoder=str(folder), device="cpu"
            )
            for place in (*upsamplers, folder, folder / "latent_upsampler")
        ),
    ]
    assert len({renderer.render([request])[0].frames_sha256() for renderer in renderers}) == 1
    config.write_text(MULTI_SCALE + f"spatial_upscaler_model_path: {upsamplers[0]}\n")
    named = load_renderer(str(file), pipeline_config=str(config), text_encoder=str(folder), device="cpu")
    assert named.weights_bytes["latent_upsampler"] == renderers[0].weights_bytes["latent_upsampler"]
    with pytest.raises(CheckpointError, match="takes a latent upsampler, and the checkpoint has none"):
        config.write_text(MULTI_SCALE)
        load_renderer(str(file), pipeline_config=str(config), text_encoder=str(folder), device="cpu")


def test_a_config_alone_can_name_the_checkpoint(
    folders: dict[str, Path], files: dict[str, Path], tmp_path: Path
) -> None:
    config = tmp_path / "base.yaml"
    config.write_text(f"checkpoint_path: {files['0.9.8']}\ntext_encoder_model_name_or_path: {folders['0.9.8']}\n")
    clips = [
        load_renderer(name, pipeline_config=str(config), device="cpu").render([REQUEST])[0]
        for name in ("", str(folders["0.9.8"]))
    ]
    assert clips[0].frames_sha256() == clips[1].frames_sha256()


def test_files_at_a_uri(
    folders: dict[str, Path], files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(files["0.9.8"]), "/official/ltx.safetensors")
    memory.put(f"{folders['0.9.8']}/", "/official/text/", recursive=True)
    uri, text = "memory://official/ltx.safetensors", "memory://official/text"
    assert load_planner(uri)(REQUEST) == load_planner(str(files["0.9.8"]))(REQUEST)
    assert not (tmp_path / "cache" / "ltx_batch" / "checkpoints").exists()  # the header was enough
    clip = load_renderer(uri, text_encoder=text, device="cpu").render([REQUEST])[0]
    here = load_renderer(str(files["0.9.8"]), text_encoder=str(folders["0.9.8"]), device="cpu").render([REQUEST])[0]
    assert clip.frames_sha256() == here.frames_sha256()
    assert checkpoint_fingerprint(uri, text_encoder=text) == checkpoint_fingerprint(
        str(files["0.9.8"]), text_encoder=str(folders["0.9.8"])
    )


def test_the_fingerprint_covers_every_part(folders: dict[str, Path], files: dict[str, Path], tmp_path: Path) -> None:
    file, folder = str(files["0.9.8"]), folders["0.9.8"]
    upsampler = str(write_official_upsampler(folder, tmp_path / "up.safetensors"))
    known = checkpoint_fingerprint(file, text_encoder=str(folder), upsampler=upsampler)["files"]
    assert {name.partition("/")[0] for name in known} == {
        "checkpoint.safetensors",
        "latent_upsampler.safetensors",
        "text_encoder",
        "tokenizer",
    }
    other = write_tiny_checkpoint(tmp_path / "other", seed=9)
    for changed in (
        {"text_encoder": str(other), "upsampler": upsampler},
        {"text_encoder": str(folder), "upsampler": str(write_official_upsampler(other, tmp_path / "b.safetensors"))},
    ):
        assert checkpoint_fingerprint(file, **changed)["files"] != known
    # In a folder, what comes from elsewhere takes the place of its own.
    mixed = checkpoint_fingerprint(str(folder), text_encoder=str(other))["files"]
    own, others = checkpoint_fingerprint(str(folder))["files"], checkpoint_fingerprint(str(other))["files"]
    assert mixed == {**own, **{name: sha for name, sha in others.items() if name.startswith(("text_", "tokenizer"))}}


def test_a_file_needs_a_text_encoder_only_where_text_is_encoded(
    files: dict[str, Path], folders: dict[str, Path]
) -> None:
    with pytest.raises(CheckpointError, match=r"set model\.text_encoder to a folder, URI or hub id"):
        checkpoint_fingerprint(str(files["0.9.8"]))
    with pytest.raises(CheckpointError, match="nowhere"):
        load_renderer(str(files["0.9.8"]), text_encoder="nowhere", device="cpu")
    renderer = load_renderer(str(files["0.9.8"]), device="cpu")
    with pytest.raises(CheckpointError, match=r"holds no text encoder: set model\.text_encoder"):
        renderer.render([REQUEST])
    embeds, mask = torch.zeros(1, 4, 16), torch.ones(1, 4)
    given = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    negative = {f"negative_{name}": value for name, value in given.items()}
    assert renderer.trace(REQUEST, **given, **negative).frames.shape == (1, 3, 9, 64, 96)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_smaller_weights_are_cast_up(folders: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    file = write_official_file(folders["0.9.8"], tmp_path / "small.safetensors", dtype=dtype)
    given = load_file(folders["0.9.8"] / "transformer" / "diffusion_pytorch_model.safetensors")
    found = load_checkpoint(file, torch.float32, with_text=False).transformer.state_dict()
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        stored = tensor.to(dtype) if tensor.ndim == 2 else tensor
        assert torch.equal(found[name], stored.to(torch.float32)), name


def test_what_the_config_says_of_the_transformer_is_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    changes = {
        "transformer.positional_embedding_theta": 5000.0,
        "transformer.positional_embedding_max_pos": [120, 1, 2],
        "transformer.timestep_scale_multiplier": 10,
        "transformer.causal_temporal_positioning": False,
        "allowed_inference_steps": ALLOWED,
        "vae.spatial_padding_mode": "replicate",
    }
    file = write_official_file(folders["0.9.8"], tmp_path / "other.safetensors", changes=changes)
    found = load_checkpoint(file, torch.float32, with_text=False)
    rope = found.transformer.rope
    assert (rope.theta, rope.base_num_frames, rope.base_height, rope.base_width) == (5000.0, 120, 1, 2)
    assert (found.timestep_scale, found.causal_positions) == (10.0, False)
    assert found.scheduler.allowed_inference_steps == tuple(ALLOWED)
    assert found.vae.encoder.conv_in.conv.padding_mode == "replicate"


def test_groups_of_blocks_may_be_bare(tmp_path: Path) -> None:
    """As in the official repository's own demo VAE: nothing between the samplers, though the decoder takes timesteps."""
    bare = {"layers_per_block": (1, 0, 0, 0, 1), "decoder_layers_per_block": (1, 0, 0, 1)}
    folder = write_tiny_checkpoint(tmp_path / "folder", transformer=TRANSFORMER, vae=bare)
    widen = ["compress_all", {"residual": True, "multiplier": 2}]
    shrink = [["compress_space_res", {"multiplier": 1}], ["compress_time_res", {"multiplier": 2}]]
    shrink += [["compress_all_res", {"multiplier": 1}]] * 2
    release = replace(
        RELEASES["0.9.8"],
        config={
            **RELEASES["0.9.8"].config,
            "encoder_blocks": [res(1), *shrink, res(1)],
            "decoder_blocks": [res(1), widen, widen, widen, res(1)],
        },
        encoder=("down_blocks.0", *(f"down_blocks.{place}.downsamplers.0" for place in range(4)), "mid_block"),
        decoder=("mid_block", *(f"up_blocks.{place}.upsamplers.0" for place in range(3)), "up_blocks.2"),
    )
    file = write_official_file(folder, tmp_path / "bare.safetensors", release)
    vaes = [load_checkpoint(place, torch.float32, with_text=False).vae for place in (file, folder)]
    assert vaes[0].decoder.up_blocks[0].time_embedder is None
    latents = torch.randn(1, 8, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    first, second = (vae.decode(latents, torch.tensor([0.05]), return_dict=False)[0] for vae in vaes)
    assert torch.equal(first, second)
