"""Modules that come from host memory to the device for a while: whole, or with their blocks one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ltx_batch.model.block_stream import BlockStream
from ltx_batch.model.packed import Packed


class Guest:
    """A module, or what is left of it `without` some inner ones."""

    def __init__(self, module: nn.Module, device: torch.device, *, without: Sequence[nn.Module] = ()) -> None:
        self._device = device
        self._pack = Packed(module, device, without=without)
        self._buffer: torch.Tensor | None = None

    @property
    def held_bytes(self) -> int:
        """What it takes of the device now."""
        return 0 if self._buffer is None else self._buffer.numel()

    def come(self) -> None:
        if self._buffer is None:
            with torch.inference_mode(False):
                self._buffer = torch.empty(self._pack.size_bytes, dtype=torch.uint8, device=self._device)
            self._buffer.copy_(self._pack.host, non_blocking=True)
            self._pack.point_at(self._buffer)

    def leave(self) -> None:
        self._pack.point_at(self._pack.host)
        self._buffer = None


class Streamed:
    """A model of blocks: the transformer, or the text encoder."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._rest = Guest(model, device, without=blocks)
        self._blocks = BlockStream(blocks, device)

    @property
    def held_bytes(self) -> int:
        return self._rest.held_bytes + self._blocks.held_bytes

    def come(self, kept_blocks: int = 0) -> None:
        """Ready to work, with so many blocks on the device to stay."""
        self._rest.come()
        self._blocks.keep(kept_blocks)

    def leave(self, staying: int | None = None) -> None:
        """Not at work; about `staying` blocks at most are still there, and for None nothing at all."""
        self._blocks.leave(staying or 0)
        if staying is None:
            self._rest.leave()

    def detach(self) -> None:
        """Let go of the model, whose tensors stay where they are. Nothing else may be called after it."""
        self._blocks.detach()

    @contextmanager
    def changing_layers(self) -> Iterator[None]:
        """Within it, layers of the blocks may be changed, and numbers of the rest, where they lie in host memory."""
        self.leave()
        yield
        self._blocks.repack()
