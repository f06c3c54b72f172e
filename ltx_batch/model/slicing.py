"""How a decode is sliced: a frozen decision from sizes and the bytes there are. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ltx_batch.model import memory
from ltx_batch.model.memory import GIB, ModelSizes
from ltx_batch.model.plan import PassPlan

_VIDEO_SHARE = 0.2  # of a sliced decode's room: a video that takes more waits in host memory
# Of the last stage, in work at once: 4 of them are worked out for their neighbours, whatever their number.
_LEAST_COLUMNS, _GOOD_COLUMNS, _ENOUGH_COLUMNS = 12, 24, 100
_SMALLEST = 16  # times smaller than those of the least columns: a decoder narrower than the published ones wants less


@dataclass(frozen=True, slots=True)
class Slices:
    """No layer of the decoder has more than about `work_bytes` in use at once. What is done waits on the device or,
    `to_host`, in host memory. `redraws`: the decoder draws noise in its layers, and so a sliced one draws other noise."""

    work_bytes: int
    to_host: bool = False
    redraws: bool = False

    def __str__(self) -> str:
        return f"slices of {self.work_bytes / GIB:.2f} GiB{', to the host' if self.to_host else ''}"


def choose_slices(sizes: ModelSizes, one: PassPlan, left_bytes: int | None, most_bytes: int | None) -> Slices | None:
    """The largest slices that fit into `left_bytes`, with at most `most_bytes` of work, and not larger than pays; None: the
    decode need not be cut.

    Where not even the smallest fit, those.
    """
    whole = memory.decode_bytes(sizes, one.height * one.width * one.num_frames)
    if most_bytes is None and (left_bytes is None or whole <= left_bytes):
        return None
    left = whole if left_bytes is None else left_bytes
    video, enough = memory.video_bytes(sizes, one), memory.columns_bytes(sizes, one, _ENOUGH_COLUMNS)
    work = memory.slice_work_bytes(sizes, one, left - video)
    to_host = most_bytes is not None or (work < enough and video > _VIDEO_SHARE * left)
    if to_host:
        work = memory.slice_work_bytes(sizes, one, left)
    work = max(_least_bytes(sizes, one), min(enough, work))
    return Slices(work if most_bytes is None else min(work, most_bytes), to_host, sizes.noisy_decoder)


def smaller_work_bytes(sizes: ModelSizes, one: PassPlan, slices: Slices | None) -> int | None:
    """What to go on with after a decode in `slices` ran out of memory; None: there is nothing smaller."""
    if slices is None:
        return memory.decode_bytes(sizes, one.height * one.width * one.num_frames) // 4
    smaller = slices.work_bytes // 2
    return None if smaller < _least_bytes(sizes, one) // _SMALLEST else smaller


def are_thin(sizes: ModelSizes, one: PassPlan, slices: Slices | None) -> bool:
    """Whether so much is worked out twice that blocks of the transformer should rather make room."""
    return slices is not None and slices.work_bytes < memory.columns_bytes(sizes, one, _GOOD_COLUMNS)


def _least_bytes(sizes: ModelSizes, one: PassPlan) -> int:
    return memory.columns_bytes(sizes, one, _LEAST_COLUMNS)
