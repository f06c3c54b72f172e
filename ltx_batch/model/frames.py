"""Frames of conditioning and input media: which of them a clip takes. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ltx_batch.errors import InvalidRow, MediaError
from ltx_batch.media import count_frames, load_frames
from ltx_batch.model.plan import TEMPORAL, pad_frames
from ltx_batch.request import Condition, Prepared, RenderRequest

_MAX_FRAMES = 1025  # of a clip: the manifest's contract


def load_media(request: RenderRequest, options: Mapping[str, Any] | None = None) -> RenderRequest:
    """The request with all its media as uint8 RGB [F, H, W, 3]: those frames that the clip takes.

    Prepared media stay as they are. `options` are fsspec options for URIs. Raises MediaError where media are missing, unreadable, not what was hashed or
    too short, InvalidRow where a video starts at a frame at which none can.
    """

    def load(condition: Condition) -> Condition:
        if isinstance(condition.media, Prepared):
            return condition
        found = load_frames(condition, request.num_frames - condition.start_frame, options)
        return replace(found, media=take_condition(np.asarray(found.media), condition.start_frame, request.num_frames))

    begin = request.input_media
    if begin is not None and not isinstance(begin.media, Prepared):
        found = load_frames(begin, pad_frames(request.num_frames), options)
        begin = replace(found, media=take_input(np.asarray(found.media), request.num_frames))
    return replace(request, conditions=tuple(load(one) for one in request.conditions), input_media=begin)


def trimmed_frames(available: int, start_frame: int, num_frames: int) -> int:
    """The most frames of the form 8k + 1 that are there and fit; pipeline_ltx_video.py, trim_conditioning_sequence.

    So a sequence has at least 9 frames, which are two latent frames; of fewer the first is a still.
    """
    return (min(available, num_frames - start_frame) - 1) // TEMPORAL * TEMPORAL + 1


def take_condition(frames: NDArray[np.uint8], start_frame: int, num_frames: int) -> NDArray[np.uint8]:
    """The frames of conditioning media that a clip of `num_frames` takes. Raises MediaError or InvalidRow."""
    check_pixels(frames)
    return frames[: condition_frames(len(frames), start_frame, num_frames)]


def condition_frames(available: int, start_frame: int, num_frames: int) -> int:
    """How many frames of conditioning media a clip takes. Raises InvalidRow where they cannot stand there."""
    count = trimmed_frames(available, start_frame, num_frames)
    if count > 1 and start_frame % TEMPORAL:
        raise InvalidRow(
            f"a conditioning video must start at a multiple of {TEMPORAL}, found frame {start_frame}; "
            "a picture may start at any frame",
            columns=("conditioning_start_frames",),
        )
    return count


def take_input(frames: NDArray[np.uint8], num_frames: int) -> NDArray[np.uint8]:
    """The frames of input media that a clip of `num_frames` takes: 8k + 1, also where it is cropped to fewer.

    Raises MediaError where there are too few.
    """
    check_pixels(frames)
    return frames[: input_frames(len(frames), num_frames)]


def input_frames(available: int, num_frames: int) -> int:
    """How many frames of input media a clip takes. Raises MediaError where there are too few."""
    needed = pad_frames(num_frames)
    if available < needed:
        found = "is a picture" if available == 1 else f"has {available} frames"
        raise MediaError(
            f"the input media {found}, and the clip has {num_frames} frames, which take {needed}: give a longer video, "
            f"or num_frames {trimmed_frames(available, 0, num_frames)} or less"
        )
    return needed


class MediaProbe:
    """What `validate` asks of local media: how many frames they have, and whether a clip can take them."""

    def frames(self, path: str) -> int:
        """As far as the longest clip goes. Raises MediaError where they cannot be read."""
        return count_frames(path, at_most=_MAX_FRAMES)

    def condition_frames(self, available: int, start_frame: int, num_frames: int) -> int:
        return condition_frames(available, start_frame, num_frames)

    def input_frames(self, available: int, num_frames: int) -> int:
        return input_frames(available, num_frames)


def check_pixels(frames: NDArray[np.uint8]) -> None:
    """Raises MediaError unless these are uint8 RGB [F, H, W, 3], at least one frame of at least one pixel."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise MediaError(f"media must be uint8 RGB [F, H, W, 3], found {frames.dtype} {list(frames.shape)}")
