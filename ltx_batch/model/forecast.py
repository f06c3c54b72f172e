"""What rows of a plan will take of a GPU, told before anything is loaded. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ltx_batch.model import cards
from ltx_batch.model.memory import CONTEXT_BYTES, GIB, ModelSizes, Work
from ltx_batch.model.placement import Room, decide, first_mode, needs
from ltx_batch.model.room import TextSizes, foresee_stay


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted bytes with every part in place, and the least that it can be done with, without a process's context.
    `placement` is how it will be rendered on the cards that there are, and `reason` why; None where those are not known.
    `text` says where the text encoder will be, None where workers have none; `peak_bytes` counts it, as far as it is there.
    The first two do not.
    """

    resident_bytes: int
    least_bytes: int
    placement: str | None = None
    reason: str | None = None
    fits: bool | None = None
    text: str | None = None
    peak_bytes: int | None = None


def forecast(sizes: ModelSizes, work: Work, room: Room | None, asked: str, text: TextSizes | None = None) -> Forecast:
    """`room` None: nobody knows the cards. `text` None: workers have no text encoder."""
    resident, least = needs(sizes, work)
    if room is None:
        return Forecast(resident, least)
    placement = decide(sizes, work, room, asked)
    told, peak = None, placement.peak_bytes
    if text is not None and room.bytes is not None:
        held = sizes.weights_bytes if first_mode(sizes, room, asked) == "resident" else 0
        away = decide(sizes, work, room, "offload") if asked in ("auto", "offload") else None
        stay = foresee_stay(text, room.bytes, held, peak, None if away is None else away.peak_bytes)
        told, peak = stay.told, stay.peak_bytes
        placement = away if stay.others_leave and away is not None else placement
    return Forecast(resident, least, placement.mode, placement.reason, placement.fits, told, peak)


def room_of(memory_gib: float | None, num_gpus: int) -> Room | None:
    """What a worker will find: `memory_gib` on each of its GPUs, else what this machine's have free now. None: there is
    none here to ask."""
    free = cards.free_bytes() if memory_gib is None else (int(memory_gib * GIB),) * num_gpus
    first, *others = (max(0, one - CONTEXT_BYTES) for one in free[:num_gpus]) if free else (None,)
    return None if first is None else Room(first, tuple(others))
