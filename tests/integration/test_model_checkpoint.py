"""Checkpoint folders: the right ones load from anywhere, the wrong ones say what is wrong."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.errors import CheckpointError
from ltx_batch.model import fetch
from ltx_batch.model.checkpoint import load_checkpoint
from ltx_batch.model.fetch import local_checkpoint
from ltx_batch.renderer import checkpoint_fingerprint
from ltx_batch.storage import fetch_uri
from tests.tiny_checkpoint import write_tiny_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(whole, tmp_path / "checkpoint")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "transformer" / WEIGHTS)
    del tensors["proj_in.weight"]
    save_file(tensors, folder / "transformer" / WEIGHTS, metadata={"format": "pt"})


def add_block(folder: Path) -> None:
    tensors = load_file(folder / "transformer" / WEIGHTS)
    tensors |= {f"transformer_blocks.2.{name}": torch.zeros(2) for name in ("a", "b", "c", "d")}
    save_file(tensors, folder / "transformer" / WEIGHTS, metadata={"format": "pt"})


def tear(folder: Path) -> None:
    file = folder / "vae" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])


def fill_with_zeros(folder: Path) -> None:
    file = folder / "vae" / WEIGHTS
    file.write_bytes(bytes(len(file.read_bytes())))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no vae": (
        lambda f: shutil.rmtree(f / "vae"),
        r"lacks vae/ \(AutoencoderKLLTXVideo\); it holds .*scheduler, text_encoder",
    ),
    "no config": (
        lambda f: (f / "vae/config.json").unlink(),
        r"vae/config.json is missing; the folder holds diffusion",
    ),
    "config is not JSON": (lambda f: (f / "vae/config.json").write_text("{"), "config.json is not JSON"),
    "config is a list": (lambda f: (f / "vae/config.json").write_text("[]"), "must hold a JSON object"),
    "another class": (
        lambda f: edit(f / "transformer/config.json", _class_name="FluxTransformer2DModel"),
        "is not a LTXVideoTransformer3DModel: its config.json says FluxTransformer2DModel",
    ),
    "no weights": (
        lambda f: (f / "transformer" / WEIGHTS).rename(f / "transformer/model.bin"),
        r"has no \*.safetensors; it holds config.json, model.bin. Pickled",
    ),
    "torn weights": (tear, r"vae/diffusion_pytorch_model.safetensors is torn: it holds \d+ bytes and its header"),
    "zeroed weights": (fill_with_zeros, "vae/diffusion_pytorch_model.safetensors is not a .safetensors file but zeros"),
    "a tensor is missing": (
        drop_tensor,
        "transformer lacks proj_in.weight; weights and config are not of one model",
    ),
    "tensors too many": (add_block, r"knows nothing of: transformer_blocks.2.a, .*2.b, .*2.c and 1 more"),
    "another depth": (
        lambda f: edit(f / "transformer/config.json", num_layers=3),
        r"transformer lacks transformer_blocks.2",
    ),
    "another width": (
        lambda f: edit(f / "transformer/config.json", attention_head_dim=32),
        r"transformer has other shapes than its config says: caption_projection.linear_1.bias \[32\] in place of \[64\]",
    ),
    "no scheduler file": (
        lambda f: (f / "scheduler/scheduler_config.json").unlink(),
        "scheduler_config.json is missing",
    ),
    "no tokenizer file": (
        lambda f: (f / "tokenizer/tokenizer.json").unlink(),
        "neither tokenizer.json nor spiece.model",
    ),
    "torn tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").write_text("{"), "tokenizer is not a tokenizer"),
}


@pytest.mark.parametrize(
    "shard",
    ["more/part.safetensors", "../part.safetensors", "{}/part.safetensors", ".part.safetensors", "_part.safetensors"],
)
def test_an_index_names_only_files_that_are_hashed(folder: Path, shard: str) -> None:
    """Whatever else it names would be read and change pictures under the same keys."""
    vae = folder / "vae"
    shard = shard.format(folder)
    (vae / shard).parent.mkdir(exist_ok=True)
    weights = (vae / WEIGHTS).rename(vae / shard)
    names = load_file(weights)
    index = vae / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(folder, torch.float32)
    for part in (str(index), repr(shard), next(iter(names)), "beside the index"):
        assert part in str(refused.value)
    weights.rename(vae / "part.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "part.safetensors")}))
    load_checkpoint(folder, torch.float32)
    assert "vae/part.safetensors" in checkpoint_fingerprint(str(folder))["files"]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_spoilt_folder_says_what_is_wrong(folder: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder, torch.float32)


def test_parts_of_different_models_are_told(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", transformer={"in_channels": 4, "caption_channels": 24})
    shutil.rmtree(folder / "transformer")
    shutil.copytree(other / "transformer", folder / "transformer")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, torch.float32)
    assert "transformer in_channels and vae latent_channels must be equal, found 4 and 8" in str(caught.value)
    assert "transformer caption_channels and text_encoder d_model must be equal, found 24 and 16" in str(caught.value)


def test_a_checkpoint_is_held_as_asked_for_and_never_trains(whole: Path) -> None:
    found = load_checkpoint(whole, torch.bfloat16)
    assert found.text is not None
    for model in (found.transformer, found.vae, found.text.load()):
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_uri_loads_what_the_folder_loads(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(f"{whole}/", "/weights/tiny/", recursive=True)
    (request,) = [RenderRequest(prompt="a", height=32, width=32, num_frames=9, timesteps=(1.0, 0.5))]
    clips = [load_renderer(place, device="cpu").render([request])[0] for place in (str(whole), "memory://weights/tiny")]
    assert clips[0].frames_sha256() == clips[1].frames_sha256()
    assert checkpoint_fingerprint("memory://weights/tiny") == checkpoint_fingerprint(str(whole))


def test_a_uri_is_downloaded_once_and_again_when_it_changes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(f"{whole}/", "/weights/changing/", recursive=True)
    first = local_checkpoint("memory://weights/changing")
    stamp = (first / "vae" / WEIGHTS).stat()
    assert local_checkpoint("memory://weights/changing") == first
    assert (first / "vae" / WEIGHTS).stat().st_mtime_ns == stamp.st_mtime_ns
    memory.pipe_file("/weights/changing/scheduler/scheduler_config.json", b'{"shift": 2.0, "more": "of it"}')
    second = local_checkpoint("memory://weights/changing")
    assert second != first
    assert b'"shift": 2.0' in (second / "scheduler/scheduler_config.json").read_bytes()
    assert sorted(entry.name for entry in first.parent.iterdir()) == sorted([first.name, second.name])


def test_actors_that_start_together_bring_one_copy(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(f"{whole}/", "/weights/shared/", recursive=True)
    brought: list[str] = []

    def fetch_slowly(uri: str, target: Path, options: Any) -> None:
        brought.append(uri)
        time.sleep(0.01)  # so that all of them are at it at once
        fetch_uri(uri, target, options)

    monkeypatch.setattr(fetch, "fetch_uri", fetch_slowly)
    with ThreadPoolExecutor(4) as actors:
        places = set(actors.map(local_checkpoint, ["memory://weights/shared"] * 4))
    (place,) = places
    assert sorted(brought) == sorted(set(brought))
    assert list(place.parent.iterdir()) == [place]


def test_a_hub_id_is_taken_from_the_hubs_cache(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--someone--tiny"
    shutil.copytree(whole, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("someone/tiny", f"someone/tiny@{commit}"):
        assert (local_checkpoint(name) / "vae" / WEIGHTS).read_bytes() == (whole / "vae" / WEIGHTS).read_bytes()
    with pytest.raises(CheckpointError, match="there is no someone/other here, and the model hub does not give it"):
        local_checkpoint("someone/other")


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (
            "ltxv-2b-0.9.8-distilled.safetensors",
            "no Lightricks/LTX-Video:ltxv-2b-0.9.8-distilled.safetensors here, and",
        ),
        ("ltxv-13b-0.9.8-distiled", "no weights at ltxv-13b.*such as ltxv-13b-0.9.8-distilled$"),
        ("nowhere.safetensors", "no weights at nowhere.safetensors; give demo, a folder, a .safetensors file"),
        ("memory://nowhere.safetensors", "no weights at memory://nowhere.safetensors"),
        ("nowhere", "no weights at nowhere; give demo, a folder, a .safetensors file, a URI, a hub id"),
        ("/nowhere/at/all", "no weights at /nowhere/at/all"),
        ("memory://nowhere/at/all", "no weights at memory://nowhere/at/all: none of transformer/"),
    ],
)
def test_a_checkpoint_that_is_nowhere_is_told(checkpoint: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        local_checkpoint(checkpoint)
