"""LPIPS v0.1 with AlexNet: how different two pictures look (Zhang et al., "The Unreasonable Effectiveness of Deep Features
as a Perceptual Metric", 2018; PerceptualSimilarity, lpips/lpips.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from ltx_batch.errors import CheckpointError

WEIGHTS = Path(__file__).parents[1] / "checkpoints" / "lpips" / "alex.safetensors"
WEIGHTS_SHA256 = "972b85a274f7af1bc18638c2257488e4740296ea1ddeefe6c5a48da7ece116e3"

# AlexNet's convolutions: number among torchvision's layers, stride, padding, and whether a pooling comes before.
_CONVOLUTIONS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # ImageNet's, for values from -1 to 1
_EPSILON = 1e-10
_PIXELS_AT_ONCE = 2**20


class Lpips:
    """The distance of frames, computed on `device`. Raises CheckpointError where the weights are missing or not those
    published."""

    def __init__(self, weights: Path | None = None, *, device: torch.device | str = "cpu") -> None:
        weights = weights or WEIGHTS
        if not weights.is_file():
            raise CheckpointError(f"the weights of LPIPS are missing at {weights}; install ltx-batch again")
        found = hashlib.sha256(weights.read_bytes()).hexdigest()
        if found != WEIGHTS_SHA256:
            raise CheckpointError(f"{weights} has sha256 {found}, not {WEIGHTS_SHA256}; install ltx-batch again")
        self._weights = load_file(weights, str(device))
        self._device = device

    @torch.inference_mode()
    def __call__(self, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.float64]:
        """LPIPS of each pair of frames, [F], from uint8 RGB [F, H, W, 3] with at least 32 pixels a side. 0: equal."""
        count = max(1, _PIXELS_AT_ONCE // (a.shape[1] * a.shape[2]))
        parts = [
            _distance(self._prepare(a[at : at + count]), self._prepare(b[at : at + count]), self._weights)
            for at in range(0, len(a), count)
        ]
        return torch.cat(parts).double().cpu().numpy()

    def _prepare(self, frames: NDArray[np.uint8]) -> Tensor:
        bytes_ = torch.from_numpy(np.ascontiguousarray(frames)).to(self._device)
        pictures = bytes_.permute(0, 3, 1, 2).float() / 127.5 - 1
        shift, scale = (torch.tensor(values, device=self._device).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
        return (pictures - shift) / scale


def pin_threads(count: int) -> None:
    """Let torch use so many CPU threads in this process."""
    torch.set_num_threads(count)


def _distance(a: Tensor, b: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros(len(a), device=a.device)
    for index, (one, other) in enumerate(zip(_features(a, weights), _features(b, weights), strict=True)):
        difference = (_unit(one) - _unit(other)).square()
        total += F.conv2d(difference, weights[f"lin{index}.model.1.weight"]).mean(dim=(1, 2, 3))
    return total


def _features(x: Tensor, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
    for layer, stride, padding, pooled in _CONVOLUTIONS:
        x = F.max_pool2d(x, kernel_size=3, stride=2) if pooled else x
        x = F.conv2d(x, weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"], stride, padding).relu()
        yield x


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON)
