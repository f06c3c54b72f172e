"""Wrong, torn and mixed files say what was found and what was expected, before a weight is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_batch.errors import CheckpointError
from ltx_batch.model.checkpoint import load_checkpoint
from ltx_batch.model.parts import open_upsampler
from ltx_batch.tensor_file import read_tensor_file
from tests.official_file import PLAIN, write_official_file, write_official_upsampler
from tests.tiny_checkpoint import write_tiny_checkpoint

Tensors = dict[str, torch.Tensor]
MODEL = "model.diffusion_model."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_official_file(folder, tmp_path_factory.mktemp("file") / "ltx.safetensors", PLAIN)


def load(file: Path) -> None:
    load_checkpoint(file, torch.float32, with_text=False)


def rewrite(file: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    save_file(change(load_file(file)), target, metadata=dict(read_tensor_file(file).metadata))
    return target


def below(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def also(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in more.items()}


ONE = torch.ones(1)
MIXED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "VAE alone": (below("vae."), r"is a VAE alone; expected a checkpoint with .* such as ltxv-13b-0.9.8-distilled"),
    "transformer alone": (below(MODEL), "is a transformer alone; expected a checkpoint with transformer and VAE"),
    "LoRA": (
        lambda _: {f"{MODEL}transformer_blocks.0.attn1.to_q.lora_A.weight": ONE},
        "is a LoRA; expected a checkpoint.* To use this one, name it in `loras`",
    ),
    "LTX-2": (
        also(**{f"{MODEL}audio_patchify_proj.weight": ONE}),
        "is an LTX-2 model, which renders sound too; expected",
    ),
    "T5": (lambda _: {"shared.weight": ONE}, "is a T5 text encoder; expected .* as model.text_encoder"),
    "something else": (
        lambda _: {"layer.weight": ONE},
        "a file of 1 tensors that are not LTX-Video's, such as layer.wei",
    ),
    "a tensor is missing": (
        without("vae.decoder.conv_in.conv.bias"),
        "lacks decoder.conv_in.conv.bias; weights and conf",
    ),
    "no statistics": (
        without("vae.per_channel_statistics.std-of-means"),
        "lacks latents_std; weights and config are not",
    ),
    "a tensor too many": (also(vae__decoder__more=ONE), "tensors that its config knows nothing of: decoder.more"),
    "a foreign part": (
        also(vocabulary__weight=ONE),
        "1 tensors such as vocabulary.weight that are neither below model.d",
    ),
    "scales": (
        also(**{f"{MODEL}transformer_blocks.0.attn1.to_q.weight_scale": ONE}),
        "carries scales for its 8-bit weights .1 tensors such as model.diffusion_model.transformer_blocks.0.attn1.to_q.wei",
    ),
    "int8": (
        also(vae__decoder__quantised=torch.ones(1, dtype=torch.int8)),
        "decoder.quantised is I8, which is a quantised",
    ),
}


@pytest.mark.parametrize("fault", MIXED)
def test_other_contents_are_told(file: Path, tmp_path: Path, fault: str) -> None:
    change, message = MIXED[fault]
    with pytest.raises(CheckpointError, match=message):
        load(rewrite(file, tmp_path / "other.safetensors", change))


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut in the weights": (
        lambda data: data[:-1000],
        r"is torn: it holds \d+ bytes and its header speaks of \d+, so it was",
    ),
    "cut in the header": (
        lambda data: data[:1000],
        "is torn: it holds 1000 bytes and its header speaks of .* it was cut",
    ),
    "written on": (lambda data: data + b"more", "its header speaks of .* so more was written to it"),
    "web page": (
        lambda _: b"<!DOCTYPE html><title>404</title>",
        "not a .safetensors file but a web page, perhaps a server's",
    ),
    "LFS pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "a Git LFS pointer, .*git lfs pull",
    ),
    "pickle": (lambda _: b"PK\x03\x04" + bytes(100), "a pickled or zipped file, and pickles are not read"),
    "zeros": (lambda data: bytes(len(data)), "not a .safetensors file but zeros"),
    "empty": (lambda _: b"", "not a .safetensors file but empty"),
    "no JSON": (lambda _: struct.pack("<Q", 12) + b"not the JSON", "not a .safetensors file but something else"),
    "other JSON": (lambda _: struct.pack("<Q", 12) + b'{"a": "bcd"}', "not a .safetensors file but something else"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_bytes_are_told(file: Path, tmp_path: Path, fault: str) -> None:
    change, message = BROKEN[fault]
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        load(broken)


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "another model's config": (
        {"transformer.num_layers": 28, "transformer.attention_head_dim": 64},
        "transformer's config and its weights are not of one model: num_layers 28 and 2, width 128 and 32",
    ),
    "another norm": ({"transformer.qk_norm": "layer_norm"}, "qk_norm 'layer_norm', expected 'rms_norm'"),
    "another VAE": ({"vae.norm_layer": "group_norm"}, "norm_layer 'group_norm', expected 'pixel_norm'"),
    "unknown block": (
        {"vae.encoder_blocks": [["attn", 1]]},
        "block attn is not known here; known are res_x, res_x_y, compr",
    ),
    "blocks of another VAE": ({"vae.decoder_blocks": [["res_x", 1]]}, "there are no blocks that change the size"),
    "uneven": (
        {"vae.decoder_blocks": [["res_x", 1], ["compress_all", 1]]},
        r"the VAE shrinks time and space by \(8, 8\) and grows them by \(2, 2\)",
    ),
    "other layers": (
        {"vae.encoder_base_channels": 16},
        "has other shapes than its config says: encoder.conv_in.conv.bias",
    ),
    "unknown sampler": (
        {"scheduler.sampler": "Euler"},
        "the scheduler's sampler Euler with shifting None is not known",
    ),
    "Constant without shift": ({"scheduler.sampler": "Constant"}, "sampler Constant needs a shift"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_a_config_that_cannot_be_is_told(folder: Path, tmp_path: Path, fault: str) -> None:
    changes, message = CONFIGS[fault]
    with pytest.raises(CheckpointError, match=message):
        load(write_official_file(folder, tmp_path / "other.safetensors", PLAIN, changes=changes))


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_metadata_that_is_no_config_is_told(file: Path, tmp_path: Path, text: str) -> None:
    save_file(load_file(file), tmp_path / "odd.safetensors", metadata={"config": text})
    with pytest.raises(CheckpointError, match=r"the config in its metadata is not (JSON|a JSON object)"):
        load(tmp_path / "odd.safetensors")


def test_upscaler_and_checkpoint_are_told_apart(folder: Path, file: Path, tmp_path: Path) -> None:
    upsampler = write_official_upsampler(folder, tmp_path / "up.safetensors")
    with pytest.raises(
        CheckpointError, match=r"is a latent upsampler; expected a checkpoint.* name it as model.upsampler"
    ):
        load(upsampler)
    with pytest.raises(
        CheckpointError, match=r"is a checkpoint.*; expected a latent upsampler, .*spatial-upscaler-0.9.8"
    ):
        open_upsampler(file)
    tensors, config = load_file(upsampler), json.loads(read_tensor_file(upsampler).metadata["config"])
    for name, changes in {"up in time": {"temporal_upsample": True}, "neither": {"spatial_upsample": False}}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata={"config": json.dumps(config | changes)})
        with pytest.raises(CheckpointError, match="expected the spatial upscaler, which leaves time alone"):
            open_upsampler(tmp_path / f"{name}.safetensors")


def test_parts_that_do_not_fit_each_other_are_told(folder: Path, file: Path, tmp_path: Path) -> None:
    sizes = {"in_channels": 16, "out_channels": 16, "caption_channels": 24}
    other = write_tiny_checkpoint(tmp_path / "other", transformer=sizes)
    vae = below("vae.")(load_file(file))
    with pytest.raises(CheckpointError) as caught:
        mixed = write_official_file(other, tmp_path / "mixed.safetensors", PLAIN, changes={"vae.latent_channels": 8})
        load_checkpoint(rewrite(mixed, mixed, lambda ts: below(MODEL)(ts) | vae), torch.float32, text_encoder=folder)
    assert "transformer in_channels and vae latent_channels must be equal, found 16 and 8" in str(caught.value)
    assert "transformer caption_channels and text_encoder d_model must be equal, found 24 and 16" in str(caught.value)
