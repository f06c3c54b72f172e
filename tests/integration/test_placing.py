"""Out of memory: what is only there for speed is given back before anything is done with less."""

from __future__ import annotations

import pytest
import torch

from ltx_batch.model.memory import ModelSizes, Work
from ltx_batch.model.placement import Placement, Room
from ltx_batch.model.placing import Placing
from ltx_batch.model.plan import Guidance, PassPlan, Plan, Target

SIZES = ModelSizes((1,) * 4, 1, 1, 1, 1, channels=64, number_bytes=4, precision="fp32")
ONE = PassPlan("pass1", 64, 64, 9, (1.0,), (Guidance(),))
WORK = Work(Plan((ONE,), Target(64, 64, 9), 24.0, 0.0, 0.05, 0.025))


def attempt(recorded: list[str], failures: int) -> tuple[Placing, list[Placement]]:
    """Render with so many failures first; recordings are `recorded` until they are given back."""
    seen: list[Placement] = []

    def relieve() -> bool:
        had = bool(recorded)
        recorded.clear()
        return had

    placing = Placing(SIZES, "offload", torch.device("cpu"), room=Room, mode=lambda: "offload", relieve=relieve)

    def render(placement: Placement) -> None:
        seen.append(placement)
        if len(seen) <= failures:
            raise torch.OutOfMemoryError("CUDA out of memory")

    placing.attempt(WORK, lambda: "denoise", render)
    return placing, seen


def test_recordings_are_given_back_before_a_lower_placement() -> None:
    placing, seen = attempt(["a graph"], failures=1)
    assert seen[0] == seen[1] and placing.told == []


def test_without_recordings_the_next_attempt_is_lower() -> None:
    placing, seen = attempt([], failures=1)
    assert seen[0] != seen[1] and len(placing.told) == 1


def test_recordings_are_given_back_even_where_nothing_lower_is_left() -> None:
    steps = 0
    while True:
        try:
            attempt([], failures=steps + 1)
        except torch.OutOfMemoryError:
            break
        steps += 1
    assert steps > 0
    attempt(["a graph"], failures=steps + 1)
    with pytest.raises(torch.OutOfMemoryError):
        attempt(["a graph"], failures=steps + 2)
