"""Where the text encoder will be, and what it adds to a peak: told before anything is loaded, as turns are then taken."""

from __future__ import annotations

import pytest
import torch

from ltx_batch.model import turns
from ltx_batch.model.forecast import forecast
from ltx_batch.model.memory import GIB, ModelSizes, Work
from ltx_batch.model.placement import Room, decide
from ltx_batch.model.room import TextSizes, foresee_stay
from tests.unit.test_placement import BF16, HD, INT8, SMALL, one_pass

T5 = {"bf16": TextSizes(int(8.9 * GIB), int(0.96 * GIB)), "int8": TextSizes(int(5.5 * GIB), int(0.7 * GIB))}
CONTEXT = 0.875
_GPU, _CPU = torch.device("cuda", 0), torch.device("cpu")
WORK = Work(HD)


def told(sizes: ModelSizes, text: str, card_gib: float, asked: str = "auto") -> tuple[str, float, str]:
    """Placement, peak in GiB over that without a text encoder, and where the text encoder is."""
    room = Room(int((card_gib - CONTEXT) * GIB))
    found = forecast(sizes, WORK, room, asked, T5[text])
    assert found.text is not None and found.peak_bytes is not None and found.placement is not None
    plain = decide(sizes, WORK, room, found.placement)
    return found.placement, (found.peak_bytes - plain.peak_bytes) / GIB, found.text


@pytest.mark.parametrize(("text", "more_gib"), [("bf16", 8.9), ("int8", 5.5)])
def test_on_a_large_card_it_stays_and_counts(text: str, more_gib: float) -> None:
    mode, more, where = told(BF16, text, 80)
    assert (mode, where) == ("resident", "stays on the GPU") and more == pytest.approx(more_gib, rel=0.01)


def test_on_a_card_that_the_render_fills_it_leaves() -> None:
    mode, more, where = told(BF16, "bf16", 48)
    assert mode == "resident" and more == 0
    assert where.startswith("leaves the GPU before a render: rendering this size wants")


def test_on_8_gib_int8_comes_alone_and_bf16_block_by_block() -> None:
    mode, more, where = told(INT8, "int8", 8)
    assert mode == "offload" and where.startswith("leaves the GPU") and more < 0.5
    mode, more, where = told(INT8, "bf16", 8)
    assert mode == "offload" and where.startswith("comes block by block") and more < 0.1
    assert "the text encoder wants 9.9 GiB, 7.1 GiB are free; model.text_precision int8" in where


def test_where_not_even_blocks_fit_the_others_leave_or_the_cpu_works() -> None:
    held, free = INT8.weights_bytes, INT8.weights_bytes + GIB
    alone = foresee_stay(T5["bf16"], free, held, free, 4 * GIB)
    assert alone.others_leave and alone.told.startswith("comes block by block")
    assert alone.peak_bytes == 4 * GIB + T5["bf16"].streamed_bytes  # there is room for what stays of it
    stuck = foresee_stay(T5["bf16"], free, held, free, None)
    assert not stuck.others_leave and stuck.peak_bytes == free and stuck.told.startswith("works on the CPU")
    assert "text: stage" in stuck.told


def test_a_plan_says_that_the_others_leave_for_it() -> None:
    room, work = Room(SMALL.weights_bytes + int(1.9 * GIB)), Work(one_pass(256, 256, 9))
    assert decide(SMALL, work, room).mode == "resident"
    assert forecast(SMALL, work, room, "auto", T5["bf16"]).placement == "offload"
    assert forecast(SMALL, work, room, "auto").text is None
    kept = forecast(SMALL, work, room, "resident", T5["bf16"])
    assert kept.placement == "resident" and "on the CPU" in str(kept.text)


@pytest.mark.parametrize("free_gib", [3, 7, 12, 16, 20, 26, 30, 40])
@pytest.mark.parametrize("movable", [True, False])
def test_turns_are_taken_as_foreseen(free_gib: int, movable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Turns` over a device of which this test keeps the books."""
    text, others, peak, away = T5["int8"], _Others(6 * GIB), 10 * GIB, 5 * GIB
    if free_gib * GIB < others.held_bytes:
        others.held_bytes = 0
    foreseen = foresee_stay(text, free_gib * GIB, others.held_bytes, peak, away if movable else None)
    encoder = _Encoder(text)
    held = lambda: others.held_bytes + encoder.held_bytes  # noqa: E731
    monkeypatch.setattr(turns, "free_bytes", lambda device: free_gib * GIB - held())
    taken = turns.Turns(_GPU, encoder.load, text.whole_bytes, others, movable=movable)  # type: ignore[arg-type]
    taken.encoder()
    wanted = away if foreseen.others_leave else peak
    taken.let_others_work(wanted)
    assert foreseen.peak_bytes == taken.peak_bytes(wanted)
    assert others.left == foreseen.others_leave


class _Others:
    def __init__(self, held_bytes: int) -> None:
        self.held_bytes, self.left = held_bytes, False

    def leave(self) -> None:
        self.held_bytes, self.left = 0, True


class _Encoder:
    """Knows where it is, and what it takes there."""

    def __init__(self, sizes: TextSizes) -> None:
        self.sizes, self.device, self.held_bytes = sizes, _CPU, 0

    def load(self, device: object) -> _Encoder:
        self.device, self.held_bytes = device, self.sizes.whole_bytes if device == _GPU else 0
        return self

    def stream(self, device: object) -> None:
        self.device, self.held_bytes = device, self.sizes.streamed_bytes

    def leave(self) -> None:
        self.device, self.held_bytes = _CPU, 0
