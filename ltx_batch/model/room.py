"""Whether the text encoder and the other parts fit on the device at once: bytes in, a decision and its reason out.

Pure and without torch. `free_bytes` None: there is nothing to share, as on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from ltx_batch.model.memory import GIB, TEXT_BYTES

STREAMED_BYTES = 2 * GIB  # T5-XXL with its blocks one by one: embeddings, two blocks in bf16, and what it computes with


@dataclass(frozen=True, slots=True)
class Room:
    """Whether two things fit beside each other, and why."""

    enough: bool
    reason: str


def room_to_encode(free_bytes: int | None, encoder_bytes: int) -> Room:
    """Whether the text encoder may come onto the device while the other parts are on it."""
    return _room(free_bytes, encoder_bytes + TEXT_BYTES, "the text encoder wants")


def room_to_render(free_bytes: int | None, peak_bytes: int) -> Room:
    """Whether the text encoder may stay on the device while the other parts want `peak_bytes`, of `free_bytes` that are
    free or theirs."""
    return _room(free_bytes, peak_bytes, "rendering this size wants")


def _room(free_bytes: int | None, wanted_bytes: int, who: str) -> Room:
    if free_bytes is None:
        return Room(True, "all parts share one memory")
    return Room(free_bytes >= wanted_bytes, f"{who} {wanted_bytes / GIB:.1f} GiB, {free_bytes / GIB:.1f} GiB are free")
