"""Conditioning and input media as uint8 frames to what the passes take.

`none` brings media to the clip's size and changes nothing else. `official` does what LTX-Video's own script does
(ltx_video/inference.py, load_media_file, load_image_to_tensor_with_resize_and_crop): every frame is cropped, blurred and
passed through H.264, and conditions stay as large as their file, so that each pass resizes them once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import conv2d, interpolate, pad

from ltx_batch.errors import MediaError
from ltx_batch.media import compress_frames
from ltx_batch.model.frames import take_condition, take_input
from ltx_batch.model.plan import Target
from ltx_batch.request import Condition, Prepared, RenderRequest

Frames = NDArray[Any]  # uint8 [F, H, W, 3]
AHEAD_BYTES = 2 * 2**30  # of finished pixels, fp32, that may wait for a request's turn
_PIXEL_BYTES = 3 * 4


@dataclass(frozen=True, slots=True)
class ConditionItem:
    """Media as every pass takes them: `pixels` fp32 [1, 3, F, H, W] in [-1, 1], F = 8k + 1, padded as the clip is. A pass
    of another size resizes them."""

    pixels: torch.Tensor
    start_frame: int
    strength: float


def preprocess_request(request: RenderRequest, preprocess: str) -> RenderRequest:
    """The request with its media, uint8 arrays, as `Prepared`: all that needs no device, so that none of it is left for the
    request's turn but where pixels are too large to wait (`AHEAD_BYTES`)."""
    target = Target(request.height, request.width, request.num_frames)
    conditions, begin = request.conditions, request.input_media
    return replace(
        request,
        conditions=tuple(_prepared(one, _Condition(target, preprocess, one.start_frame)) for one in conditions),
        input_media=begin and _prepared(begin, _Input(target, preprocess)),
    )


def prepare_media(
    frames: Frames | Prepared, start_frame: int, strength: float, target: Target, preprocess: str = "none"
) -> ConditionItem:
    """Conditioning media, uint8 RGB [F, H, W, 3], trimmed to what fits the clip, cropped to its shape, and padded as it is.

    `preprocess` none: resized to the clip's size first. official: blurred and compressed at the size of the file, which
    they keep, and padded with the clip's pads at that size. Raises MediaError or InvalidRow.
    """
    return ConditionItem(_video(frames, _Condition(target, preprocess, start_frame)), start_frame, strength)


def prepare_input_media(frames: Frames | Prepared, target: Target, preprocess: str) -> torch.Tensor:
    """What video to video begins from: fp32 [1, 3, F, H, W] in [-1, 1] of the target's padded size and frames.

    uint8 RGB [F, H, W, 3] are cropped to the clip's shape, resized to its size (Pillow's bicubic, as in the official
    script), with `official` blurred and compressed at that size, and padded. Raises MediaError where frames are too few.
    """
    return _video(frames, _Input(target, preprocess))


class _Steps(Protocol):
    """Both halves of the work: uint8 frames that are cut and cropped, and fp32 [F, 3, H, W] in [-1, 1], padded."""

    @property
    def target(self) -> Target: ...
    def shape(self, frames: Frames) -> Frames: ...
    def finish(self, shaped: Frames) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class _Condition:
    target: Target
    preprocess: str
    start_frame: int

    def shape(self, frames: Frames) -> Frames:
        taken = take_condition(frames, self.start_frame, self.target.num_frames)
        return _degrade(_crop(taken, self.target)) if self.preprocess == "official" else taken

    def finish(self, shaped: Frames) -> torch.Tensor:
        if self.preprocess == "official":
            return pad(_to_pixels(shaped), self.target.pads)
        return _pad_to(_fit(shaped, self.target), self.target)


@dataclass(frozen=True, slots=True)
class _Input:
    target: Target
    preprocess: str

    def shape(self, frames: Frames) -> Frames:
        sized = _resize(_crop(take_input(frames, self.target.num_frames), self.target), self.target)
        return _degrade(sized) if self.preprocess == "official" else sized

    def finish(self, shaped: Frames) -> torch.Tensor:
        return _pad_to(_to_pixels(shaped), self.target)


def _prepared(condition: Condition, steps: _Steps) -> Condition:
    media = condition.media
    if isinstance(media, Prepared):
        return condition
    shaped = steps.shape(np.asarray(media))
    largest = max(shaped.shape[1] * shaped.shape[2], steps.target.padded_height * steps.target.padded_width)
    waits = len(shaped) * largest * _PIXEL_BYTES <= AHEAD_BYTES
    return replace(condition, media=Prepared(steps.finish(shaped).numpy() if waits else shaped))


def _video(frames: Frames | Prepared, steps: _Steps) -> torch.Tensor:
    """fp32 [1, 3, F, H, W]."""
    done = frames.frames if isinstance(frames, Prepared) else steps.shape(frames)
    pixels = torch.from_numpy(done) if done.dtype == np.float32 else steps.finish(done)
    return pixels.transpose(0, 1).unsqueeze(0)


# official, frame by frame


def crop_box(height: int, width: int, target: Target) -> tuple[int, int, int, int]:
    """Left, top, width and height of the largest centred part with the target's shape, rounded as the official code does."""
    aspect = target.width / target.height
    if width / height > aspect:
        kept = int(height * aspect)
        return (width - kept) // 2, 0, kept, height
    kept = int(width / aspect)
    return 0, (height - kept) // 2, width, kept


def _crop(frames: Frames, target: Target) -> Frames:
    height, width = frames.shape[1:3]
    left, top, wide, tall = crop_box(height, width, target)
    if min(wide, tall) < 2:
        raise MediaError(
            f"media of {width}x{height} pixels leave {wide}x{tall} when cropped to the shape of {target.width}x{target.height}"
        )
    return frames[:, top : top + tall, left : left + wide]


def _resize(frames: Frames, target: Target) -> Frames:
    size = (target.width, target.height)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames])


def _degrade(frames: Frames) -> Frames:
    """Blurred a little and compressed, as the videos were that the model learnt from; odd sizes lose their last line."""
    return compress_frames(np.stack([_blur(frame) for frame in frames]))


def _blur(frame: Frames) -> Frames:
    """uint8 [H, W, 3]: 3x3 Gaussian, sigma 1, borders mirrored, cut to uint8 (crf_compressor.py does that, with .byte()).

    torchvision, transforms/_functional_tensor.py, gaussian_blur. Frame by frame in float32 as there: fractions that are
    nearly whole are cut to another value by any other order of sums.
    """
    line = torch.exp(-0.5 * torch.linspace(-1.0, 1.0, steps=3).pow(2))
    line = line / line.sum()
    kernel = torch.mm(line[:, None], line[None, :]).expand(3, 1, 3, 3)
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1).contiguous().float().div(255)
    blurred = conv2d(pad(pixels[None], (1, 1, 1, 1), mode="reflect"), kernel, groups=3)
    return (blurred[0].permute(1, 2, 0) * 255.0).byte().numpy()


def _to_pixels(frames: Frames) -> torch.Tensor:
    """uint8 [F, H, W, 3] to fp32 [F, 3, H, W] in [-1, 1], with the official roundings."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()
    return pixels.div_(255.0).mul_(255.0).div_(127.5).sub_(1.0)


# ours


def _fit(frames: Frames, target: Target) -> torch.Tensor:
    """fp32 [F, 3, H, W] in [-1, 1] of the target's size. Bilinear, as the official passes resize, but filtered where it
    shrinks: large photographs would alias."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    height, width = pixels.shape[-2:]
    aspect = target.height / target.width
    tall, wide = min(height, max(1, round(width * aspect))), min(width, max(1, round(height / aspect)))
    top, left = (height - tall) // 2, (width - wide) // 2
    cropped = pixels[..., top : top + tall, left : left + wide]
    size = (target.height, target.width)
    if cropped.shape[-2:] == size:
        return cropped
    return interpolate(cropped, size, mode="bilinear", align_corners=False, antialias=True)


def _pad_to(pixels: torch.Tensor, target: Target) -> torch.Tensor:
    """To the padded size, mid-grey; a line that compression took from an odd size comes back as grey, too."""
    left, right, top, bottom = target.pads
    missing_down, missing_across = target.height - pixels.shape[-2], target.width - pixels.shape[-1]
    return pad(pixels, (left, right + missing_across, top, bottom + missing_down))
