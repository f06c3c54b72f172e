"""Whether the text encoder and the other parts fit on the device at once: bytes in, a decision and its reason out.

Pure and without torch. `free_bytes` None: there is nothing to share, as on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from ltx_batch.model.memory import GIB, TEXT_BYTES, USABLE

STREAMED_BYTES = 2 * GIB  # T5-XXL with its blocks one by one: embeddings, two blocks in bf16, and what it computes with
WORKING_BYTES = GIB // 10  # what T5-XXL computes with, for 256 tokens
ADVICE_ALONE = "model.text_precision int8 makes it smaller"
ADVICE = f"{ADVICE_ALONE}, text: stage takes it out of the workers"


@dataclass(frozen=True, slots=True)
class Room:
    """Whether two things fit beside each other, and why."""

    enough: bool
    reason: str


@dataclass(frozen=True, slots=True)
class TextSizes:
    """Bytes of the text encoder's weights, and of those that are there while its blocks come one by one."""

    whole_bytes: int
    streamed_bytes: int


@dataclass(frozen=True, slots=True)
class TextStay:
    """Where the text encoder will be, in words, and the peak that makes of the whole: while it works, or of the render
    with what stays of it. `others_leave`: for it to work they must, and from then on come for their stages."""

    told: str
    peak_bytes: int
    others_leave: bool = False


def foresee_stay(
    text: TextSizes, free_bytes: int, others_bytes: int, peak_bytes: int, away_bytes: int | None
) -> TextStay:
    """What `Turns` will do. `free_bytes` is what all parts together may use; of it the others hold `others_bytes` when the
    first text comes, and want `peak_bytes` in all for a render, or `away_bytes` once they have left; None: they cannot."""
    left = free_bytes - others_bytes
    whole = room_to_encode(left, text.whole_bytes)
    leave = not whole.enough and left < STREAMED_BYTES and away_bytes is not None
    if leave and away_bytes is not None:
        others_bytes, left, peak_bytes = 0, free_bytes, away_bytes
    if not whole.enough and left < STREAMED_BYTES:
        return TextStay(f"works on the CPU: {whole.reason}; {ADVICE}", peak_bytes, leave)
    held = text.whole_bytes if whole.enough else text.streamed_bytes
    working = others_bytes + held + WORKING_BYTES
    stays = room_to_render(int(USABLE * (free_bytes - held)), peak_bytes)
    if whole.enough:
        how = "stays on the GPU" if stays.enough else f"leaves the GPU before a render: {stays.reason}"
    else:
        how = f"comes block by block for each new prompt: {whole.reason}; {ADVICE}"
    return TextStay(how, max(working, peak_bytes + (held if stays.enough else 0)), leave)


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
