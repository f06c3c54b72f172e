"""The little world that the demo checkpoint knows: one shape that moves over a plain background.

Lengths are fractions of the frame's shorter side, so that one scene looks alike at every size. A clip moves its shape
along a straight line at constant speed; the speed is counted in sides per clip, whatever the frame rate, so that a
prompt means the same at 8 and at 30 frames a second. x points right, y points down.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (218, 38, 42),
    "orange": (245, 140, 28),
    "yellow": (242, 218, 50),
    "green": (46, 180, 72),
    "cyan": (58, 206, 226),
    "blue": (44, 82, 226),
    "purple": (150, 50, 200),
    "pink": (246, 130, 190),
}
BACKGROUNDS = {
    "dark": (22, 24, 32),
    "white": (238, 238, 234),
    "grey": (128, 130, 132),
    "sand": (208, 186, 148),
    "teal": (28, 92, 98),
}
_DIAGONAL = math.sqrt(0.5)
DIRECTIONS = {
    "right": (1.0, 0.0),
    "down-right": (_DIAGONAL, _DIAGONAL),
    "down": (0.0, 1.0),
    "down-left": (-_DIAGONAL, _DIAGONAL),
    "left": (-1.0, 0.0),
    "up-left": (-_DIAGONAL, -_DIAGONAL),
    "up": (0.0, -1.0),
    "up-right": (_DIAGONAL, -_DIAGONAL),
}
SIZES = {"small": (0.12, 0.14), "large": (0.18, 0.21)}  # radius
SPEEDS = {"slow": (0.18, 0.22), "fast": (0.36, 0.44)}  # path length of a whole clip

# How far a shape of radius 1 reaches: left and right, up, down. The areas are close to each other.
SQUARE_HALF, TRIANGLE_RADIUS, STAR_RADIUS, STAR_INNER = 0.9, 1.3, 1.35, 0.45
_REACH = {
    "circle": (1.0, 1.0, 1.0),
    "square": (SQUARE_HALF, SQUARE_HALF, SQUARE_HALF),
    "triangle": (TRIANGLE_RADIUS * math.sqrt(0.75), TRIANGLE_RADIUS, TRIANGLE_RADIUS / 2),
    "star": (STAR_RADIUS * math.sin(math.radians(72)), STAR_RADIUS, STAR_RADIUS * math.cos(math.radians(36))),
}
MARGIN = 0.015  # background that always stays free between the shape and the frame's edge

COUNTS = (len(SHAPES), len(COLOURS), len(DIRECTIONS), len(BACKGROUNDS), len(SIZES), len(SPEEDS))
FRAME_RATES_HZ = (8.0, 30.0)


def _held_out_table() -> Tensor:
    """bool [shape, colour, direction, background]: one combination in ten, chosen by a hash of its names."""
    table = torch.zeros(COUNTS[:4], dtype=torch.bool)
    for s, shape in enumerate(SHAPES):
        for c, colour in enumerate(COLOURS):
            for d, direction in enumerate(DIRECTIONS):
                for b, background in enumerate(BACKGROUNDS):
                    digest = hashlib.sha256(f"{shape} {colour} {direction} {background}".encode()).digest()
                    table[s, c, d, b] = digest[0] % 10 == 0
    return table


HELD_OUT = _held_out_table()


@functools.cache
def constant(values: tuple[float, ...] | tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """A table on the device, float32, copied there once: a copy in every step would make the device wait."""
    return torch.tensor(values, device=device, dtype=torch.float32)


@functools.cache
def _combinations(held_out: bool, device: torch.device) -> Tensor:
    return (HELD_OUT.flatten() == held_out).nonzero()[:, 0].to(device)


@dataclass(frozen=True)
class Scenes:
    """A batch of clips to draw, all of one size. Attributes are int64 [B], positions float32."""

    height: int
    width: int
    num_frames: int
    shape: Tensor
    colour: Tensor
    direction: Tensor
    background: Tensor
    size: Tensor
    speed: Tensor
    radius: Tensor  # [B], in sides
    start: Tensor  # [B, 2] x, y of the centre in the first frame, in sides
    path: Tensor  # [B, 2] the whole way, in sides
    tint: Tensor  # [B, 3] factor on the shape's colour, near 1

    def __len__(self) -> int:
        return self.shape.shape[0]

    @property
    def combination(self) -> Tensor:
        """int64 [B]: one number for all six attributes, the row of this clip in the caption pool."""
        index = torch.zeros_like(self.shape)
        for count, value in zip(COUNTS, attributes(self), strict=True):
            index = index * count + value
        return index

    def resized(self, height: int, width: int) -> Scenes:
        """The same scenes at another size of the same aspect ratio."""
        return replace(self, height=height, width=width)


def attributes(scenes: Scenes) -> tuple[Tensor, ...]:
    return scenes.shape, scenes.colour, scenes.direction, scenes.background, scenes.size, scenes.speed


def combination_names(combination: int) -> tuple[str, str, str, str, str, str]:
    """Shape, colour, direction, background, size and speed of a combination number."""
    tables = (SHAPES, tuple(COLOURS), tuple(DIRECTIONS), tuple(BACKGROUNDS), tuple(SIZES), tuple(SPEEDS))
    names: list[str] = []
    for table in reversed(tables):
        combination, position = divmod(combination, len(table))
        names.append(table[position])
    shape, colour, direction, background, size, speed = reversed(names)
    return shape, colour, direction, background, size, speed


def is_held_out(combination: int) -> bool:
    return bool(HELD_OUT.flatten()[combination // (COUNTS[4] * COUNTS[5])])


def sample_scenes(
    count: int,
    height: int,
    width: int,
    num_frames: int,
    *,
    held_out: bool = False,
    generator: torch.Generator,
) -> Scenes:
    """Random scenes from the training combinations, or from the held-out ones, on the generator's device."""
    device = generator.device
    allowed = _combinations(held_out, device)
    pick = allowed[torch.randint(len(allowed), (count,), generator=generator, device=device)]
    background = pick % COUNTS[3]
    direction = pick // COUNTS[3] % COUNTS[2]
    colour = pick // (COUNTS[3] * COUNTS[2]) % COUNTS[1]
    shape = pick // (COUNTS[3] * COUNTS[2] * COUNTS[1])
    size = torch.randint(COUNTS[4], (count,), generator=generator, device=device)
    speed = torch.randint(COUNTS[5], (count,), generator=generator, device=device)
    radius = _between(tuple(SIZES.values()), size, generator)
    length = _between(tuple(SPEEDS.values()), speed, generator)
    path = constant(tuple(DIRECTIONS.values()), device)[direction] * length[:, None]
    tint = 1 + 0.06 * (torch.rand((count, 3), generator=generator, device=device) - 0.5)
    start = _start(shape, radius, path, height, width, generator)
    return Scenes(
        height, width, num_frames, shape, colour, direction, background, size, speed, radius, start, path, tint
    )


def _between(ranges: tuple[tuple[float, float], ...], choice: Tensor, generator: torch.Generator) -> Tensor:
    table = constant(ranges, choice.device)[choice]
    weight = torch.rand(choice.shape, generator=generator, device=choice.device)
    return torch.lerp(table[:, 0], table[:, 1], weight)


def _start(shape: Tensor, radius: Tensor, path: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """[B, 2]: a start from which the shape stays in the frame all the way."""
    reach = constant(tuple(_REACH[name] for name in SHAPES), shape.device)[shape] * radius[:, None] + MARGIN
    side = min(height, width)
    low = torch.stack([reach[:, 0], reach[:, 1]], dim=1) - path.clamp(max=0)
    extent = constant((width / side, height / side), shape.device)
    high = extent - torch.stack([reach[:, 0], reach[:, 2]], dim=1) - path.clamp(min=0)
    return low + (high - low) * torch.rand(path.shape, generator=generator, device=shape.device)
