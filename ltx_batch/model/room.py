"""Whether the text encoder and the other parts fit on the device at once: bytes in, a decision and its reason out.

Pure and without torch. `free_bytes` None: there is nothing to share, as on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from ltx_batch.model.plan import Plan

GIB = 2**30
_ENCODING_BYTES = GIB  # T5-XXL needs a tenth of that for 256 tokens; the rest is what an allocator cannot use
# Sums of the tensors that live at once in bf16, at the peak: in the decoder of 0.9.5 to 0.9.8 per pixel of the last
# pass, in a transformer with flash attention per token and channel of one row.
_DECODE_BYTES = 100
_DENOISE_BYTES = 32


@dataclass(frozen=True, slots=True)
class Room:
    """Whether two things fit beside each other, and why."""

    enough: bool
    reason: str


def room_to_encode(free_bytes: int | None, encoder_bytes: int) -> Room:
    """Whether the text encoder may come onto the device while the other parts are on it."""
    return _room(free_bytes, encoder_bytes + _ENCODING_BYTES, "the text encoder wants")


def room_to_render(free_bytes: int | None, working_bytes: int) -> Room:
    """Whether the text encoder may stay on the device while the other parts work in `working_bytes`."""
    return _room(free_bytes, working_bytes, "rendering this size wants")


def working_bytes(plan: Plan, *, rows: int, channels: int, number_bytes: int) -> int:
    """What a render needs beside the weights, about. `channels` are the transformer's, `number_bytes` 2 for bf16.

    Rows are denoised together and decoded one by one.
    """
    last = plan.passes[-1]
    decode = _DECODE_BYTES * last.num_frames * last.height * last.width
    asked = max((guidance.rows for one in plan.passes for guidance in one.guidance), default=1)
    denoise = _DENOISE_BYTES * last.tokens * channels * asked * rows
    return max(decode, denoise) * number_bytes // 2


def _room(free_bytes: int | None, wanted_bytes: int, who: str) -> Room:
    if free_bytes is None:
        return Room(True, "all parts share one memory")
    return Room(free_bytes >= wanted_bytes, f"{who} {wanted_bytes / GIB:.1f} GiB, {free_bytes / GIB:.1f} GiB are free")
