"""Tiles: a picture cut into overlapping rectangles that the VAE encodes one by one. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ltx_batch.model.plan import SPATIAL

OVERLAP = 64  # pixels: two latents, the overlap of diffusers' own tiling
_LEAST = 192  # pixels a side: of a smaller tile most is overlap
_MOST_CUTS = 64


@dataclass(frozen=True, slots=True)
class Tiles:
    """Height and width of the largest tile and how far neighbours overlap: pixels, multiples of 32."""

    height: int
    width: int
    overlap: int = OVERLAP

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def grid(self, height: int, width: int) -> tuple[list[int], list[int]]:
        """Where tiles of a picture begin: rows and columns in pixels."""
        return _starts(height, self.height, self.overlap), _starts(width, self.width, self.overlap)

    def worked_pixels(self, height: int, width: int) -> int:
        """Pixels of all tiles: what is worked out, overlaps more than once."""
        tops, lefts = self.grid(height, width)
        return sum(min(self.height, height - top) for top in tops) * sum(
            min(self.width, width - left) for left in lefts
        )


def choose_tiles(height: int, width: int, limit: int) -> Tiles | None:
    """The cut with the least to work out whose tiles have at most `limit` pixels; None: the picture need not be cut.

    Where not even the smallest tiles keep to the limit, those.
    """
    if height * width <= limit:
        return None
    candidates = [Tiles(*sides) for sides in product(_sides(height), _sides(width))]
    fitting = [tiles for tiles in candidates if tiles.pixels <= limit]
    if not fitting:
        return min(candidates, key=lambda tiles: tiles.pixels)
    return min(fitting, key=lambda tiles: (tiles.worked_pixels(height, width), -tiles.pixels))


def _sides(length: int) -> Iterator[int]:
    """Sides that cut `length` into 1, 2, 3 ... tiles of about one size, down to the least."""
    for count in range(1, _MOST_CUTS):
        side = math.ceil((length + (count - 1) * OVERLAP) / count / SPATIAL) * SPATIAL
        if count > 1 and side < _LEAST:
            return
        yield min(side, length)


def _starts(length: int, side: int, overlap: int) -> list[int]:
    step = side - overlap
    count = max(1, math.ceil((length - overlap) / step)) if step > 0 else 1
    return [index * step for index in range(count)]
