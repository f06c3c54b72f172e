"""Streamed weights are what the libraries load, and take no memory but their own."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5EncoderModel

from benchmarks.load_memory import write_places
from ltx_batch.errors import CheckpointError
from ltx_batch.model import streaming
from ltx_batch.model.checkpoint import TextParts, load_checkpoint
from ltx_batch.model.measure import weights_bytes
from tests.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("piece_bytes", [2**18, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_part_is_what_its_library_loads(
    folder: Path, dtype: torch.dtype, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "_PIECE_BYTES", {"cpu": piece_bytes})
    found = load_checkpoint(folder, dtype)
    assert found.text is not None
    pairs = [
        (found.transformer, LTXVideoTransformer3DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)),
        (found.vae, AutoencoderKLLTXVideo.from_pretrained(folder / "vae", torch_dtype=dtype)),
        (
            found.latent_upsampler,
            LTXLatentUpsamplerModel.from_pretrained(folder / "latent_upsampler", torch_dtype=dtype),
        ),
        (found.text.load(), T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype)),
    ]
    for ours, theirs in pairs:
        given, wanted = ours.state_dict(), theirs.state_dict()
        assert given.keys() == wanted.keys()
        assert all(given[name].dtype == dtype and torch.equal(given[name], wanted[name]) for name in wanted)
        assert weights_bytes(ours) == weights_bytes(theirs)  # tied weights are held once
        assert not ours.training
        assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_shards_are_one_model(folder: Path, tmp_path: Path) -> None:
    """Weights as large models keep them: several files and an index."""
    sharded = shutil.copytree(folder, tmp_path / "sharded")
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        whole = sharded / part / f"{stem}.safetensors"
        tensors = sorted(load_file(whole).items())
        index = {}
        for place, half in enumerate((tensors[::2], tensors[1::2])):
            name = f"{stem}-0000{place + 1}-of-00002.safetensors"
            save_file(dict(half), sharded / part / name)
            index |= {key: name for key, _ in half}
        whole.unlink()
        (sharded / part / f"{whole.name}.index.json").write_text(json.dumps({"weight_map": index}))
    first, second = load_checkpoint(folder, torch.float32), load_checkpoint(sharded, torch.float32)
    assert first.text is not None
    assert second.text is not None
    for one, other in ((first.transformer, second.transformer), (first.text.load(), second.text.load())):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    (sharded / "transformer" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks diffusion_pytorch_model-00002-of-00002.safetensors, which"):
        load_checkpoint(sharded, torch.float32)


def test_several_files_without_an_index_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, copy / "vae" / "a.safetensors")
    load_checkpoint(copy, torch.float32)  # the one that diffusers takes
    weights.rename(copy / "vae" / "b.safetensors")
    with pytest.raises(
        CheckpointError, match=r"has several \*.safetensors and none called diffusion_pytorch_model.safe"
    ):
        load_checkpoint(copy, torch.float32)


def test_a_file_that_shrinks_while_it_is_read_is_told(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    parts = TextParts.find(copy, "float32")
    file = copy / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="ended while it was read: did something write to it"):
        parts.load()


def test_a_load_that_fails_holds_no_weights(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    parts = TextParts.find(copy, "float32")
    file = copy / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])

    def held() -> int:
        return sum(type(one) in (torch.Tensor, nn.Parameter) and not one.is_meta for one in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = held()
        with suppress(CheckpointError):
            parts.load()
        assert held() <= before
    finally:
        gc.enable()


def test_loading_takes_little_more_than_the_weights(tmp_path: Path) -> None:
    """Folders and single files of 100 MB, cast and not, in a process of its own."""
    places = write_places(tmp_path, 100)
    command = [sys.executable, "benchmarks/load_memory.py", "--places", *map(str, places)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    measured = json.loads(told.splitlines()[-1])
    ours = [one for one in measured if one["loader"] == "ltx_batch"]
    assert len(ours) == 8
    assert all(one["weights_mb"] > 40 and 0.9 < one["ratio"] <= 1.15 for one in ours), ours
    # The measure sees what it should: mapped files that are cast stay beside what is made of them.
    cast = [one for one in measured if one["loader"] == "diffusers" and not one["place"].endswith(one["asked"])]
    assert all(one["ratio"] > 1.3 for one in cast), cast
