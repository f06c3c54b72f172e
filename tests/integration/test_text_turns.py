"""Turns on a device: where the text encoder is, who leaves for whom, and what happens when memory runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ltx_batch.model import turns
from ltx_batch.model.checkpoint import TextParts
from ltx_batch.model.memory import GIB
from ltx_batch.model.text import TextEncoder
from ltx_batch.model.turns import Turns
from tests.tiny_checkpoint import write_tiny_checkpoint

CPU, DEVICE = torch.device("cpu"), torch.device("cpu:0")  # the second plays the GPU: torch tells them apart


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def encoder(tiny: Path) -> TextEncoder:
    return TextEncoder.load(TextParts.find(tiny, "float32"), CPU)


class Rest:
    """The other parts: 64 bytes, until they are sent away."""

    def __init__(self) -> None:
        self.held_bytes = 64

    def leave(self) -> None:
        self.held_bytes = 0


@pytest.fixture
def rest() -> Rest:
    return Rest()


@pytest.fixture
def own(tiny: Path) -> TextEncoder:
    """One for a test of its own, which it may send to and fro; loaded where renders load it, in the midst of inference."""
    with torch.inference_mode():
        return TextEncoder.load(TextParts.find(tiny, "float32"), CPU)


def make_turns(
    encoder: TextEncoder, rest: turns.Others, free: list[int], patch: pytest.MonkeyPatch, **more: Any
) -> Turns:
    """A device of which `free` tells what is left, asked in this order. The encoder has 2 GiB and wants 3, or 2 block by
    block."""
    patch.setattr(turns, "free_bytes", lambda device: free.pop(0))

    def load(device: torch.device) -> TextEncoder:
        encoder.device = device
        return encoder

    return Turns(DEVICE, load, 2 * GIB, rest, **more)


def test_an_encoder_that_fits_stays_beside_the_others(
    own: TextEncoder, rest: Rest, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = make_turns(own, rest, [3 * GIB, 100], monkeypatch)
    assert both.encoder().device == DEVICE
    both.let_others_work(150)
    assert both.encoder().device == DEVICE and rest.held_bytes == 64
    assert both.told == "on the device: the text encoder wants 3.0 GiB, 3.0 GiB are free"


def test_an_encoder_leaves_when_a_render_wants_its_place_and_comes_back_block_by_block(
    encoder: TextEncoder, own: TextEncoder, rest: Rest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = encoder.encode("a red circle")
    both = make_turns(own, rest, [3 * GIB, 100, 3 * GIB, 100], monkeypatch)
    assert torch.equal(both.encoder().encode("a red circle"), expected)
    both.let_others_work(160)
    assert own.device == CPU and rest.held_bytes == 64
    assert both.told.startswith("left the device: rendering this size wants")
    both.let_others_work(160)
    assert torch.equal(both.encoder().encode("a red circle"), expected)
    assert own.device == DEVICE and both.held_bytes > 0
    assert both.told.startswith("on the device, block by block")
    both.let_others_work(160)
    assert both.held_bytes == 0


def test_an_encoder_that_does_not_fit_comes_block_by_block(
    encoder: TextEncoder, own: TextEncoder, rest: Rest, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = make_turns(own, rest, [3 * GIB - 1], monkeypatch)
    assert torch.equal(both.encoder().encode("a red circle"), encoder.encode("a red circle"))
    assert own.device == DEVICE and rest.held_bytes == 64
    assert both.told == "on the device, block by block: the text encoder wants 3.0 GiB, 3.0 GiB are free"


def test_the_others_leave_where_not_even_blocks_fit(
    encoder: TextEncoder, own: TextEncoder, rest: Rest, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = make_turns(own, rest, [2 * GIB - 1, 2 * GIB], monkeypatch)
    assert torch.equal(both.encoder().encode("a red circle"), encoder.encode("a red circle"))
    assert own.device == DEVICE and rest.held_bytes == 0


@pytest.mark.parametrize("movable", [True, False])
def test_else_the_encoder_works_on_the_cpu(
    encoder: TextEncoder, own: TextEncoder, rest: Rest, movable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = make_turns(own, rest, [2 * GIB - 1] * (1 + movable), monkeypatch, movable=movable)
    assert torch.equal(both.encoder().encode("a red circle"), encoder.encode("a red circle"))
    both.let_others_work(10**15)
    assert own.device == CPU and rest.held_bytes == (0 if movable else 64)
    assert both.told.startswith("on the CPU: the text encoder wants 3.0 GiB") and "text: stage" in both.told


def test_an_encoder_alone_is_told_once_what_makes_it_smaller(
    own: TextEncoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = make_turns(own, turns.Nobody(), [GIB] * 6, monkeypatch)
    with caplog.at_level("INFO", logger=turns.__name__):
        for _ in range(3):
            alone.encoder()
    assert "text_precision int8" in alone.told and "text: stage" not in alone.told
    assert len(caplog.records) == 1


def test_one_that_runs_out_of_memory_goes_down_step_by_step(
    encoder: TextEncoder,
    own: TextEncoder,
    rest: Rest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """First what is only there for speed goes, then the encoder comes block by block, then the others leave, then it works on
    the CPU."""
    recorded, places = [True], []
    works = own.encode

    def encode(text: str) -> torch.Tensor:
        places.append((own.device, both.told.partition(":")[0], recorded == [True]))
        if own.device == DEVICE:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return works(text)

    monkeypatch.setattr(own, "encode", encode)
    monkeypatch.setattr(turns, "give_back", lambda device: None)
    both = make_turns(own, rest, [3 * GIB] * 4, monkeypatch, relieve=lambda: bool(recorded and recorded.pop()))
    assert torch.equal(both.encode("a red circle"), encoder.encode("a red circle"))
    assert places == [
        (DEVICE, "on the device", True),
        (DEVICE, "on the device", False),
        (DEVICE, "on the device, block by block", False),
        (DEVICE, "on the device, block by block", False),
        (CPU, "on the CPU", False),
    ]
    assert rest.held_bytes == 0
    assert both.told.startswith("on the CPU: it ran out of memory there")
    assert len([record for record in caplog.records if "ran out of memory" in record.message]) == 4


def test_an_encoder_that_cannot_even_be_loaded_whole_comes_block_by_block(
    encoder: TextEncoder, own: TextEncoder, rest: Rest, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = make_turns(own, rest, [3 * GIB] * 2, monkeypatch)
    load, asked = both._load, []

    def full(device: torch.device) -> TextEncoder:
        asked.append(device)
        if device == DEVICE:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(device)

    both._load = full
    monkeypatch.setattr(turns, "give_back", lambda device: None)
    assert torch.equal(both.encode("a red circle"), encoder.encode("a red circle"))
    assert asked == [DEVICE, CPU] and both.told.startswith("on the device, block by block: it ran out of memory")


def test_no_memory_on_the_cpu_is_raised(own: TextEncoder, rest: Rest, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(text: str) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(own, "encode", full)
    monkeypatch.setattr(turns, "give_back", lambda device: None)
    with pytest.raises(torch.OutOfMemoryError):
        make_turns(own, rest, [3 * GIB] * 4, monkeypatch).encode("a red circle")
