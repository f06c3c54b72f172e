"""What rows of a plan will take of a GPU, told before anything is loaded. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ltx_batch.model import cards
from ltx_batch.model.memory import CONTEXT_BYTES, GIB, ModelSizes, Work
from ltx_batch.model.placement import Room, decide, needs


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted bytes with every part in place, and the least that it can be done with, without a process's context.
    `placement` is how it will be rendered on the cards that there are, and `reason` why; None where those are not known.
    """

    resident_bytes: int
    least_bytes: int
    placement: str | None = None
    reason: str | None = None
    fits: bool | None = None


def forecast(sizes: ModelSizes, work: Work, room: Room | None, asked: str) -> Forecast:
    """`room` None: nobody knows the cards."""
    resident, least = needs(sizes, work)
    if room is None:
        return Forecast(resident, least)
    placement = decide(sizes, work, room, asked)
    return Forecast(resident, least, placement.mode, placement.reason, placement.fits)


def room_of(memory_gib: float | None, num_gpus: int) -> Room | None:
    """What a worker will find: `memory_gib` on each of its GPUs, else what this machine's have free now. None: there is
    none here to ask."""
    free = cards.free_bytes() if memory_gib is None else (int(memory_gib * GIB),) * num_gpus
    first, *others = (max(0, one - CONTEXT_BYTES) for one in free[:num_gpus]) if free else (None,)
    return None if first is None else Room(first, tuple(others))
