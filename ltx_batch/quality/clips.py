"""The quality of one clip against another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltx_batch.errors import MediaError
from ltx_batch.media import read_media
from ltx_batch.media.vmaf import MIN_SIDE_PX
from ltx_batch.quality.metrics import METRICS, Frames, Metric, PerFrame, unavailable

MIN_CLIP_SIDE_PX = 32  # below, the last layers of LPIPS see nothing

_FACTS = ("num_frames", "height", "width", "identical_frames")

Clip = str | Path | NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of a clip: the mean of its frames, its worst frame's value, and which frame that is, from 0."""

    mean: float
    worst: float
    worst_frame: int


@dataclass(frozen=True, slots=True)
class ClipQuality:
    """How near a clip is to its reference. `psnr` in dB, at most 60 a frame; `ssim` up to 1; `lpips` from 0, smaller is
    nearer; `vmaf` 0 to 100. None: not available here, or, for VMAF, below 64 pixels a side. `identical_frames` are equal
    to the last bit."""

    num_frames: int
    height: int
    width: int
    identical_frames: int
    psnr: Score | None
    ssim: Score | None
    lpips: Score | None
    vmaf: Score | None

    def score(self, metric: str) -> Score | None:
        found: Score | None = getattr(self, metric)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Flat: `psnr`, `psnr_worst`, `psnr_worst_frame`, and so on."""
        flat: dict[str, Any] = {name: getattr(self, name) for name in _FACTS}
        for name in METRICS:
            score = self.score(name)
            values = (None, None, None) if score is None else (score.mean, score.worst, score.worst_frame)
            flat |= zip(_columns(name), values, strict=True)
        return flat


def _columns(metric: str) -> tuple[str, str, str]:
    return metric, f"{metric}_worst", f"{metric}_worst_frame"


NO_QUALITY: Mapping[str, None] = MappingProxyType(
    dict.fromkeys([*_FACTS, *(column for name in METRICS for column in _columns(name))])
)


def compare_clips(a: Clip, b: Clip) -> ClipQuality:
    """The quality of `b` with `a` as the reference: a local video or picture, or uint8 RGB [F, H, W, 3].

    Raises MediaError where one cannot be read, or where their sizes or numbers of frames differ.
    """
    reference, other = _frames(a), _frames(b)
    if fault := mismatch(reference, other):
        raise MediaError(f"the clips cannot be compared: {fault}")
    frames, height, width, _ = reference.shape
    missing = set(unavailable())
    if min(height, width) < MIN_SIDE_PX:
        missing.add("vmaf")
    scores = {
        name: None if name in missing else _score(metric, metric.compute(reference, other))
        for name, metric in METRICS.items()
    }
    identical = int((reference == other).all(axis=(1, 2, 3)).sum())
    return ClipQuality(frames, height, width, identical, **scores)


def mismatch(a: Frames, b: Frames) -> str | None:
    """Why two clips cannot be compared frame by frame; None where they can."""
    if a.shape[1:3] != b.shape[1:3]:
        return f"{a.shape[2]}x{a.shape[1]} pixels against {b.shape[2]}x{b.shape[1]}"
    if len(a) != len(b):
        return f"{len(a)} frames against {len(b)}"
    if min(a.shape[1:3]) < MIN_CLIP_SIDE_PX:
        return f"{a.shape[2]}x{a.shape[1]} pixels: the metrics need {MIN_CLIP_SIDE_PX} a side"
    return None


def _frames(clip: Clip) -> Frames:
    if isinstance(clip, str | Path):
        return read_media(clip)
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or not len(clip):
        raise MediaError(f"frames must be uint8 [F, H, W, 3] with F >= 1, not {clip.dtype} {list(clip.shape)}")
    return clip


def _score(metric: Metric, values: PerFrame) -> Score:
    at = metric.worst(values)
    return Score(float(values.mean()), float(values[at]), at)
