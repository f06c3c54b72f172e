"""Read a clip of the demo world from its pixels alone: which colour, shape, direction and background does it show?

Nothing here is learned. The background is fitted to the frame's edge, the shape is what differs from it, its colour is the
nearest of the palette, its direction the way of its centroid, and its form the outline that covers the same pixels best.
A torn or doubled shape can have all of these right, so that is read too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from . import world
from .draw import BACKGROUND_FALLOFF
from .draw import distance as outline_distance

_COLOURS = np.array(tuple(world.COLOURS.values()), dtype=np.float64)
_BACKGROUNDS = np.array(tuple(world.BACKGROUNDS.values()), dtype=np.float64)
_LOOKS = 5  # frames whose outlines are compared
_LEAST_CONTRAST = 20.0  # of 255: below this nothing is seen
_LEAST_WAY = 0.05  # of the shorter side: a shape that moved less stands still
_LEAST_AREA = 4.0  # pixels: below this a frame shows no shape
_MOST_MISFIT = 0.5  # of the shape's area: outlines that fit no better are torn, doubled or half there


@dataclass(frozen=True)
class Reading:
    """Names as in `world`; None where the clip shows no such thing. `whole`: in every look there is one shape, no more
    and no less, about as large as in the others."""

    shape: str | None
    colour: str | None
    direction: str | None
    background: str
    whole: bool = False


def read(frames: NDArray[np.uint8]) -> Reading:
    """`frames` uint8 [F, H, W, 3]."""
    pixels = frames.astype(np.float64)
    base = _background(pixels)
    background = tuple(world.BACKGROUNDS)[_nearest(base, _BACKGROUNDS)]
    height = np.linspace(0.5, -0.5, pixels.shape[1])[None, :, None, None]
    difference = pixels - base * (1 + BACKGROUND_FALLOFF * height)
    distance = np.linalg.norm(difference, axis=-1)
    strongest = np.percentile(distance, 99.5)
    if strongest < _LEAST_CONTRAST:
        return Reading(None, None, None, background)
    inside = distance > 0.6 * strongest
    colour = np.median(pixels[inside], axis=0)
    cover = np.clip(difference @ (colour - base) / np.sum((colour - base) ** 2), 0, 1)
    cover[distance < 0.2 * strongest] = 0
    picks = np.linspace(0, len(cover) - 1, min(_LOOKS, len(cover))).round().astype(int)
    misfits = np.stack([_misfits(frame) for frame in cover[picks]])
    return Reading(
        shape=_shape(misfits),
        colour=tuple(world.COLOURS)[_nearest(colour, _COLOURS)],
        direction=_direction(cover),
        background=background,
        whole=_whole(misfits, cover[picks].sum(axis=(1, 2))),
    )


def _background(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colour [3] at half height, from a thin frame around the picture, which the shape may touch only in part."""
    height = np.linspace(0.5, -0.5, pixels.shape[1])[None, :, None, None]
    level = pixels / (1 + BACKGROUND_FALLOFF * height)
    edges = (level[:, :2], level[:, -2:], level[:, :, :2], level[:, :, -2:])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def _nearest(colour: NDArray[np.float64], palette: NDArray[np.float64]) -> int:
    return int(np.linalg.norm(palette - colour, axis=1).argmin())


def _centroids(cover: NDArray[np.float64]) -> NDArray[np.float64]:
    """[F, 2] x, y in pixels; NaN where a frame shows nothing."""
    mass = cover.sum(axis=(1, 2))
    mass[mass < 1] = np.nan
    y, x = np.mgrid[: cover.shape[1], : cover.shape[2]] + 0.5
    return np.stack([(cover * x).sum(axis=(1, 2)) / mass, (cover * y).sum(axis=(1, 2)) / mass], axis=1)


def _direction(cover: NDArray[np.float64]) -> str | None:
    centres = _centroids(cover)
    quarter = max(1, len(centres) // 4)
    first, last = centres[:quarter], centres[-quarter:]
    if np.isnan(first).all() or np.isnan(last).all():
        return None
    way = np.nanmean(last, axis=0) - np.nanmean(first, axis=0)
    if np.hypot(*way) < _LEAST_WAY * min(cover.shape[1:]):
        return None
    names, ways = tuple(world.DIRECTIONS), np.array(tuple(world.DIRECTIONS.values()))
    return names[int((ways @ way).argmax())]


def _misfits(frame: NDArray[np.float64]) -> NDArray[np.float64]:
    """How much of its area each outline of the frame's area and centre is off, [shapes]; infinite where nothing is seen."""
    area = frame.sum()
    if area < _LEAST_AREA:
        return np.full(len(world.SHAPES), np.inf)
    centre = _centroids(frame[None])[0]
    found = []
    for index, (unit_area, unit_y) in enumerate(_UNIT):
        radius = math.sqrt(area / unit_area)
        outline = _outline(index, radius, centre - (0, unit_y * radius), frame.shape)
        found.append(np.abs(outline - frame).sum() / area)
    return np.array(found)


def _shape(misfits: NDArray[np.float64]) -> str | None:
    """The outline that differs least, summed over the looks [looks, shapes]; None where one of them shows nothing."""
    errors = misfits.sum(axis=0)
    return world.SHAPES[int(errors.argmin())] if np.isfinite(errors).all() else None


def _whole(misfits: NDArray[np.float64], areas: NDArray[np.float64]) -> bool:
    steady = np.abs(np.log(np.maximum(areas, _LEAST_AREA) / np.median(areas))).max() < _MOST_MISFIT
    return bool(steady and misfits.min(axis=1).max() < _MOST_MISFIT)


def _outline(index: int, radius: float, centre: NDArray[np.float64], size: tuple[int, ...]) -> NDArray[np.float64]:
    """Cover [H, W] of a shape of `radius` pixels around `centre` (x, y)."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    position = (torch.from_numpy(grid / radius)[None, None] for grid in (x - centre[0], y - centre[1]))
    distance = outline_distance(torch.tensor([index]), *position)[0, 0].numpy()
    return np.clip(0.5 - distance * radius, 0, 1)


def _unit(index: int) -> tuple[float, float]:
    """Area and centroid's y of a shape of radius 1, measured on a fine grid."""
    scale, size = 200.0, (640, 640)
    cover = _outline(index, scale, np.array([320.0, 320.0]), size)
    return float(cover.sum() / scale**2), float((_centroids(cover[None])[0, 1] - 320.0) / scale)


_UNIT = tuple(_unit(index) for index in range(len(world.SHAPES)))
