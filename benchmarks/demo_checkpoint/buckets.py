"""Sizes the demo checkpoint is trained at, with how much of the work each gets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bucket:
    """Clips of one size in pixels and frames. `share` is its part of the training steps."""

    height: int
    width: int
    num_frames: int
    share: float

    @property
    def pixels(self) -> int:
        return self.height * self.width * self.num_frames

    @property
    def latent_size(self) -> tuple[int, int, int]:
        return (self.num_frames - 1) // 8 + 1, self.height // 32, self.width // 32

    @property
    def tokens(self) -> int:
        frames, height, width = self.latent_size
        return frames * height * width


# Multi-scale rendering runs pairs of these: 64 -> 128, 96x160 -> 192x320, 160 -> 320. The first is the commonest.
BUCKETS = (
    Bucket(128, 128, 17, 0.34),
    Bucket(128, 128, 25, 0.10),
    Bucket(64, 64, 17, 0.05),
    Bucket(64, 64, 25, 0.02),
    Bucket(160, 160, 17, 0.07),
    Bucket(160, 160, 25, 0.04),
    Bucket(96, 160, 17, 0.07),
    Bucket(96, 160, 25, 0.03),
    Bucket(160, 96, 17, 0.05),
    Bucket(160, 256, 17, 0.05),
    Bucket(160, 256, 25, 0.02),
    Bucket(256, 160, 17, 0.03),
    Bucket(256, 256, 17, 0.04),
    Bucket(256, 256, 25, 0.02),
    Bucket(192, 320, 17, 0.03),
    Bucket(320, 192, 17, 0.01),
    Bucket(320, 320, 17, 0.02),
    Bucket(320, 320, 25, 0.01),
)
MAIN = BUCKETS[0]


def pick(rng: random.Random, buckets: Sequence[Bucket]) -> Bucket:
    return rng.choices(buckets, [bucket.share for bucket in buckets])[0]
