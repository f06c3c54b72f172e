"""The text encoder on a CUDA device: there, away, and block by block; the frames are the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.model import turns
from ltx_batch.model.device import free_bytes
from ltx_batch.model.memory import GIB
from ltx_batch.model.room import room_to_encode
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.gpu

REQUEST = RenderRequest(prompt="a red circle", height=64, width=96, num_frames=17, guidance_scale=3.0, seed=7)
PLENTY = 2**40
# By name: what a stopwatch chooses may differ from one renderer to the next.
NAMED: dict[str, Any] = {"device": "cuda", "precision": "bf16", "attention": "native"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("free", "encoder", "told"),
    [
        ([PLENTY, PLENTY], "cuda", "on the device: "),
        ([PLENTY, 0], "cpu", "left the device: "),
        ([2 * GIB, PLENTY], "cuda", "on the device, block by block: "),
        ([0, PLENTY, PLENTY], "cuda", "on the device, block by block: "),
        ([0, 2 * GIB, 0], "cpu", "left the device: "),
    ],
)
def test_where_the_encoder_is_changes_no_bit(
    tiny: Path, free: list[int], encoder: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_renderer(str(tiny), **NAMED).render([REQUEST])[0]
    monkeypatch.setattr(turns, "free_bytes", lambda device: free.pop(0))
    monkeypatch.setattr(turns, "room_to_encode", lambda free, size: room_to_encode(free, 3 * GIB))
    renderer = load_renderer(str(tiny), **NAMED)
    clip = renderer.render([REQUEST])[0]
    assert clip.frames_sha256() == plain.frames_sha256()
    assert clip.ran["text"]["encoder"] == 2 and free == []
    pipeline = renderer._pipeline
    assert clip.ran["text"]["place"].startswith(told)
    assert pipeline.turns is not None and pipeline.turns._encoder is not None
    assert pipeline.turns._encoder.device.type == encoder


def test_free_memory_counts_what_torch_keeps(tiny: Path) -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    free = free_bytes(device)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    held = free_bytes(device)
    del block
    assert free is not None and held is not None
    assert free - held >= 2**28 and free_bytes(device) > held, "freed, though the driver has not got it back"


def test_an_embedding_of_the_cache_is_the_encoders(tiny: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "text")
    filling = load_renderer(str(tiny), **NAMED, text_cache=cache).render([REQUEST])[0]
    reading = load_renderer(str(tiny), **NAMED, text_cache=cache, text="precomputed").render([REQUEST])[0]
    assert filling.frames_sha256() == reading.frames_sha256()
    assert (filling.ran["text"]["encoder"], reading.ran["text"]["cache"]) == (2, 2)
