"""Clips judged in processes of their own, while the device renders the next ones: PSNR and SSIM against a reference, and
what the demo's reader sees in them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.demo_checkpoint.evaluate import ATTRIBUTES, Expected
from benchmarks.demo_checkpoint.reader import read
from ltx_batch.model.lpips import pin_threads
from ltx_batch.quality.metrics import psnr, ssim

Clips = NDArray[np.uint8]  # [clips, F, H, W, 3]


@dataclass(frozen=True)
class Score:
    """Of one clip: means over its frames, and which of `ATTRIBUTES` are as its prompt says."""

    psnr: float
    ssim: float
    right: tuple[bool, ...]


def open_crew(workers: int) -> Executor:
    """So many processes of one thread each; 0: a thread of this process."""
    if workers == 0:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context("forkserver")  # imports once; and a fork of this process would have its GPU
    crew = ProcessPoolExecutor(workers, mp_context=context, initializer=pin_threads, initargs=(1,))
    crew.submit(os.getpid)  # starts them
    return crew


def score_clips(clips: Clips, expected: Sequence[Expected], reference: Clips) -> list[Score]:
    """One a clip; `reference` are the clips that they are held against."""
    found = []
    for clip, truth, other in zip(clips, expected, reference, strict=True):
        reading = read(clip)
        right = tuple(getattr(reading, name) == truth[name] for name in ATTRIBUTES)
        found.append(Score(float(psnr(other, clip).mean()), float(ssim(other, clip).mean()), right))
    return found
