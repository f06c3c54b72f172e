"""Conditioning media as uint8 frames to what the passes take: trimmed, cropped, padded as the clip is padded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate, pad

from ltx_batch.errors import InvalidRow, MediaError
from ltx_batch.model.plan import TEMPORAL, Target


@dataclass(frozen=True, slots=True)
class ConditionItem:
    """Media as every pass takes them: `pixels` fp32 [1, 3, F, H, W] in [-1, 1], F = 8k + 1, padded as the clip is. A pass
    of another size resizes them."""

    pixels: torch.Tensor
    start_frame: int
    strength: float


def prepare_media(frames: NDArray[np.uint8], start_frame: int, strength: float, target: Target) -> ConditionItem:
    """Trim uint8 RGB [F, H, W, 3] to what fits the clip, bring it to the clip's size, and pad it as the clip is padded.

    Media of another shape are cropped around their centre, never stretched. Raises MediaError or InvalidRow.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise MediaError(
            f"conditioning media must be uint8 RGB [F, H, W, 3], found {frames.dtype} {list(frames.shape)}"
        )
    count = trimmed_frames(len(frames), start_frame, target.num_frames)
    if count > 1 and start_frame % TEMPORAL:
        raise InvalidRow(f"a conditioning video must start at a multiple of {TEMPORAL}, found frame {start_frame}")
    pixels = torch.from_numpy(np.ascontiguousarray(frames[:count])).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    pixels = _fit(_crop(pixels, target.height / target.width), target.height, target.width)
    pixels = pad(pixels, target.pads)
    return ConditionItem(pixels.transpose(0, 1).unsqueeze(0), start_frame, strength)


def trimmed_frames(available: int, start_frame: int, num_frames: int) -> int:
    """The most frames of the form 8k + 1 that are there and fit; pipeline_ltx_video.py, trim_conditioning_sequence."""
    return (min(available, num_frames - start_frame) - 1) // TEMPORAL * TEMPORAL + 1


def _crop(pixels: torch.Tensor, aspect: float) -> torch.Tensor:
    """The largest centred part of [F, 3, H, W] whose height over width is `aspect`."""
    height, width = pixels.shape[-2:]
    tall, wide = min(height, max(1, round(width * aspect))), min(width, max(1, round(height / aspect)))
    top, left = (height - tall) // 2, (width - wide) // 2
    return pixels[..., top : top + tall, left : left + wide]


def _fit(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear, as the official code resizes, but filtered where it shrinks: large photographs would alias."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    return interpolate(pixels, (height, width), mode="bilinear", align_corners=False, antialias=True)
