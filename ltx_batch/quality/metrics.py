"""The four metrics of a pair of clips, frame by frame."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ltx_batch.media.vmaf import has_vmaf, vmaf

if TYPE_CHECKING:
    from ltx_batch.model.lpips import Lpips

Frames = NDArray[np.uint8]
PerFrame = NDArray[np.float64]

MAX_PSNR_DB = 60.0  # as libvmaf has it for 8 bits: equal frames have no finite value, and one would swallow every mean
_INSTALL = "pip install 'ltx-batch[quality]'"


@dataclass(frozen=True, slots=True)
class Metric:
    """`compute` takes uint8 RGB [F, H, W, 3] twice, reference first, and gives a value a frame, [F]."""

    name: str
    title: str
    higher_is_better: bool
    compute: Callable[[Frames, Frames], PerFrame]
    digits: int
    unit: str = ""

    @property
    def label(self) -> str:
        return f"{self.title} {self.unit}".strip()

    def told(self, value: float) -> str:
        return f"{value:.{self.digits}f}"

    def worst(self, values: PerFrame) -> int:
        """The index of the worst value."""
        return int(np.argmin(values) if self.higher_is_better else np.argmax(values))


def psnr(a: Frames, b: Frames) -> PerFrame:
    """Peak signal-to-noise ratio in dB over the three channels of each frame, at most `MAX_PSNR_DB`."""
    errors = [float(np.square(one.astype(np.int32) - other).mean()) for one, other in zip(a, b, strict=True)]
    return np.minimum(10 * np.log10(255.0**2 / np.maximum(errors, 1e-16)), MAX_PSNR_DB)


def ssim(a: Frames, b: Frames) -> PerFrame:
    """Structural similarity of each frame: Gaussian window of 11 pixels (sigma 1.5), full size, mean of the channels.

    The settings by which scikit-image matches Wang et al., "Image quality assessment", 2004.
    """
    from skimage.metrics import structural_similarity

    values = [
        structural_similarity(
            one.astype(np.float32),  # double, its default, takes longer and changes the seventh digit
            other.astype(np.float32),
            channel_axis=-1,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for one, other in zip(a, b, strict=True)
    ]
    return np.array(values, dtype=np.float64)


def lpips(a: Frames, b: Frames) -> PerFrame:
    return _lpips()(a, b)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("psnr", "PSNR", True, psnr, 2, "dB"),
            Metric("ssim", "SSIM", True, ssim, 4),
            Metric("lpips", "LPIPS", False, lpips, 4),
            Metric("vmaf", "VMAF", True, vmaf, 2),
        )
    }
)


@cache
def unavailable() -> Mapping[str, str]:
    """The metrics that cannot be computed here, and what to do about it."""
    from ltx_batch.errors import CheckpointError

    found = {}
    if importlib.util.find_spec("skimage") is None:
        found["ssim"] = f"scikit-image is not installed: {_INSTALL}"
    try:
        _lpips()
    except CheckpointError as error:
        found["lpips"] = str(error)
    if not has_vmaf():
        found["vmaf"] = "this ffmpeg has no libvmaf: pip install --upgrade imageio-ffmpeg, and unset IMAGEIO_FFMPEG_EXE"
    return MappingProxyType(found)


@cache
def _lpips() -> Lpips:
    from ltx_batch.model.lpips import Lpips

    return Lpips()
