"""Draw captioned clips of the demo world; as a script, write a contact sheet to look at.

python -m benchmarks.demo_checkpoint.draw --out clips.png
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import captions, world
from .world import Scenes

LIGHT = 0.10  # how much brighter the lit side of a shape is
BACKGROUND_FALLOFF = 0.04  # how much darker a background is at the bottom than at the top


def draw(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """Clips float32 [B, 3, F, H, W] in -1..1, and how much of each pixel the shape covers, [B, 1, F, H, W] in 0..1."""
    x, y = _relative_position(scenes)
    distance_px = distance(scenes.shape, x, y) * (scenes.radius * min(scenes.height, scenes.width)).view(-1, 1, 1, 1)
    cover = (0.5 - distance_px).clamp(0, 1)[:, None]
    light = (1 - LIGHT * (x + y)).clamp(1 - 1.5 * LIGHT, 1 + 1.5 * LIGHT)[:, None]
    colour = _palette(world.COLOURS, scenes.colour) * scenes.tint
    shape = (colour.view(-1, 3, 1, 1, 1) * light).clamp(0, 1)
    height = torch.linspace(0.5, -0.5, scenes.height, device=x.device).view(1, 1, 1, -1, 1)
    background = _palette(world.BACKGROUNDS, scenes.background).view(-1, 3, 1, 1, 1) * (1 + BACKGROUND_FALLOFF * height)
    return torch.lerp(background.expand_as(shape), shape, cover) * 2 - 1, cover


def to_uint8(clips: Tensor) -> Tensor:
    """[B, 3, F, H, W] in -1..1 to uint8 [B, F, H, W, 3]."""
    return ((clips.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1)


def _palette(colours: dict[str, tuple[int, int, int]], choice: Tensor) -> Tensor:
    """float32 [B, 3] in 0..1."""
    return world.constant(tuple(colours.values()), choice.device)[choice] / 255


def _relative_position(scenes: Scenes) -> tuple[Tensor, Tensor]:
    """x and y of each pixel from the shape's centre, in radii: [B, F, H, W] each."""
    device, side = scenes.radius.device, min(scenes.height, scenes.width)
    moment = torch.linspace(0, 1, scenes.num_frames, device=device)
    centre = scenes.start[:, None] + scenes.path[:, None] * moment[None, :, None]
    column = (torch.arange(scenes.width, device=device) + 0.5) / side
    row = (torch.arange(scenes.height, device=device) + 0.5) / side
    radius = scenes.radius.view(-1, 1, 1, 1)
    x = (column.view(1, 1, 1, -1) - centre[..., 0, None, None]) / radius
    y = (row.view(1, 1, -1, 1) - centre[..., 1, None, None]) / radius
    frame = (len(scenes), scenes.num_frames, scenes.height, scenes.width)
    return x.expand(frame), y.expand(frame)


def distance(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the outline in radii, negative inside; `shape` [B] picks the outline."""
    circle = (x * x + y * y).sqrt() - 1
    square = torch.maximum(x.abs(), y.abs()) - world.SQUARE_HALF
    slope = math.sqrt(0.75) * x.abs() - 0.5 * y
    triangle = torch.maximum(y, slope) - world.TRIANGLE_RADIUS / 2
    outlines = {"circle": circle, "square": square, "triangle": triangle, "star": _star_distance(x, y)}
    chosen = circle
    for index, name in enumerate(world.SHAPES):
        chosen = torch.where((shape == index).view(-1, 1, 1, 1), outlines[name], chosen)
    return chosen


def _star_distance(x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to a five-pointed star that points up, by folding the plane onto half of one point."""
    cosine, sine = math.cos(math.radians(36)), math.sin(math.radians(36))
    x, y = x.abs(), -y
    for normal_x in (cosine, -cosine):
        fold = 2 * (normal_x * x - sine * y).clamp(min=0)
        x, y = x - fold * normal_x, y + fold * sine
    x, y = x.abs(), y - world.STAR_RADIUS
    edge_x, edge_y = world.STAR_INNER * sine, world.STAR_INNER * cosine - 1
    along = ((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2)).clamp(0, world.STAR_RADIUS)
    distance = ((x - edge_x * along) ** 2 + (y - edge_y * along) ** 2).sqrt()
    return distance * torch.sign(y * edge_x - x * edge_y)


def contact_sheet(clips: list[np.ndarray], path: Path, columns: int = 5, scale: int = 1) -> None:
    """Write rows of clips, `columns` frames of each from first to last; clips are uint8 [F, H, W, 3]."""
    rows = []
    width = max(clip.shape[2] for clip in clips)
    for clip in clips:
        picks = np.linspace(0, len(clip) - 1, columns).round().astype(int)
        row = np.concatenate([np.pad(clip[i], ((2, 2), (2, width - clip.shape[2] + 2), (0, 0))) for i in picks], axis=1)
        rows.append(row)
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("clips.png"))
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(options.seed)
    scenes = world.sample_scenes(options.count, options.height, options.width, options.num_frames, generator=generator)
    clips, _ = draw(scenes)
    contact_sheet(list(to_uint8(clips).numpy()), options.out)
    words = random.Random(options.seed)
    for row, combination in enumerate(scenes.combination.tolist()):
        print(f"{row}: {captions.caption(world.combination_names(combination), words)}")


if __name__ == "__main__":
    main()
