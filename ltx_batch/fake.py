"""FakeRenderer: colour bars in place of a model, with faults and durations scripted in the prompt.

    "any words [sleep 0.2] [raise] [raise MediaError] [exit 3] [segfault] [hang] [once /path/marker: exit 3]"

Directives run in order, per request. `once PATH:` does its directive only for the first process that creates PATH, which
scripts a fault that passes. Everything else (worker, ledger, pools, Ray) is the real thing.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ltx_batch import errors
from ltx_batch.clip import Clip
from ltx_batch.request import RenderRequest

_BARS = np.array(
    [[255, 255, 255], [255, 255, 0], [0, 255, 255], [0, 255, 0], [255, 0, 255], [255, 0, 0], [0, 0, 255], [0, 0, 0]],
    dtype=np.uint8,
)


class FakeRenderer:
    """Renders colour bars that drift to the right, one pixel a frame, from an offset that the seed sets."""

    weights_bytes: Mapping[str, int] = {}
    device = "fake"

    def __init__(self, precision: str = "fp32") -> None:
        self.precision = precision

    def prepare(self, request: RenderRequest) -> RenderRequest:
        return request

    def render(self, requests: Sequence[RenderRequest], *, unquantised: bool = False) -> list[Clip]:
        started_s = time.perf_counter()
        for request in requests:
            _play(request.prompt)
        frames = [_bars(request) for request in requests]
        seconds = (time.perf_counter() - started_s) / len(requests)
        ran = {"precision": self.precision, "device": self.device, "degraded": unquantised}
        return [
            Clip(pixels, request.frame_rate, {"denoise": seconds}, dict(ran))
            for request, pixels in zip(requests, frames, strict=True)
        ]

    def close(self) -> None:
        pass


def write_fake_video(clip: Clip, target: Path) -> None:
    """The hash of the frames in place of a video (`video.codec: fake`)."""
    target.write_text(clip.frames_sha256())


def _bars(request: RenderRequest) -> np.ndarray:
    columns = np.arange(request.width)[None, :] + np.arange(request.num_frames)[:, None] + request.seed % request.width
    bars = _BARS[(columns * len(_BARS) // request.width) % len(_BARS)]
    return np.repeat(bars[:, None], request.height, axis=1)


def _play(prompt: str) -> None:
    for directive in re.findall(r"\[([^\]]+)\]", prompt):
        once = re.match(r"once (\S+): (.+)", directive)
        if once is None:
            _perform(directive)
        elif _first(once[1]):
            _perform(once[2])


def _first(marker: str) -> bool:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _perform(directive: str) -> None:
    verb, _, argument = directive.partition(" ")
    match verb:
        case "sleep":
            time.sleep(float(argument))
        case "hang":
            time.sleep(1e6)
        case "exit":
            os._exit(int(argument or 1))
        case "segfault":
            ctypes.string_at(0)
        case "raise":
            error = getattr(errors, argument, None) if argument else RuntimeError
            raise (error or RuntimeError)(f"scripted fault: {argument or 'RuntimeError'}")
        case _:
            raise ValueError(f"unknown directive [{directive}]")
