"""Named noise: every draw of a row has a name, and depends on the row's seed and that name alone.

Never on the device, the batch, the order of draws or the process that draws. docs/pipeline.md lists the names and the
shapes they are drawn in, which are the official ones: always fp32, always one row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

# (name, shape) -> standard normal fp32 of that shape. Whoever compares renderers passes their own.
Noise = Callable[[str, tuple[int, ...]], torch.Tensor]


def row_noise(seed: int) -> Noise:
    """The draws of a row with this seed."""

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(named_seed(seed, name))
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    return draw


def named_seed(seed: int, name: str) -> int:
    """First 8 bytes of sha256 of "seed:name". Part of the promise about pixels: changing it changes every video."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")


def draw_rows(noises: Sequence[Noise], name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The draw of each row, [rows, *shape], on `device`; `shape` is without the row axis."""
    drawn = torch.cat([noise(name, (1, *shape)) for noise in noises])
    # Pinned, the copy to a GPU waits for nothing, and drawing the next step's noise hides behind this step.
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn
