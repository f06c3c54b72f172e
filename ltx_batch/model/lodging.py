"""The parts of a model between host and device: the execution of a `Placement`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ltx_batch.model.device import give_back, gpus
from ltx_batch.model.guests import Guest, Streamed
from ltx_batch.model.placement import Mode, Placement
from ltx_batch.model.sharding import deal_out

log = logging.getLogger(__name__)


class Lodging:
    """Where transformer, VAE and upsampler are.

    They lie where they were loaded until `settle` or `leave`. `mode` says how they live from then on: `resident` on the
    device, `offload` in host memory, coming for their stages, `sharded` with the blocks over several GPUs. `offload` is
    left for another only when a stand-in made way for what was there before.
    """

    def __init__(self, device: torch.device, transformer: Any, vae: Any, upsampler: Any | None) -> None:
        self.mode: Mode | None = None
        self._device = device
        self._transformer, self._vae, self._upsampler = transformer, vae, upsampler
        self._streamed: Streamed | None = None
        self._stand_in: Streamed | None = None
        self._guests: dict[str, Guest] = {}
        self._gather: Callable[[], None] | None = None

    @property
    def held_bytes(self) -> int:
        """Weights on the device."""
        return self.held_on(gpus(self._device)[0])

    def held_on(self, device: torch.device) -> int:
        """Weights on one of the process's devices."""
        if self.mode == "offload":
            parts: list[Guest | Streamed | None] = [*self._guests.values(), self._streamed, self._stand_in]
            first = device == gpus(self._device)[0]
            return sum(part.held_bytes for part in parts if part is not None) if first else 0
        models = [self._transformer, self._vae, *([self._upsampler] if self._upsampler is not None else [])]
        return sum(bytes_on(model, device) for model in models)

    @torch.inference_mode(False)  # tensors of inference could never be moved between their places
    def settle(self, placement: Placement) -> None:
        """Take up the placement's mode."""
        if self.mode == placement.mode:
            return
        if placement.mode == "offload":
            self._settle_in_host()
        elif placement.mode == "sharded":
            self._invite_guests()
            self._gather = deal_out(self._transformer, placement.shards, gpus(self._device))
        else:
            for model in (self._transformer, self._vae, self._upsampler):
                # A part lies where its first weight does. To move it anew would copy what waits in page-locked memory twice.
                if model is not None and next(model.parameters()).device != self._device:
                    model.to(self._device)
        self.mode = placement.mode
        give_back(self._device)

    def _settle_in_host(self) -> None:
        if self._gather is not None:
            self._gather()
            self._gather = None
        self._invite_guests()
        blocks = list(self._transformer.transformer_blocks)
        self._streamed = Streamed(self._transformer, blocks, self._device)
        self.mode = "offload"

    @contextmanager
    def at(self, stage: str, placement: Placement, number: int = 0) -> Iterator[None]:
        """Within it, what works in `stage` is on the device: in `denoise` the transformer, for the pass of that number."""
        transformer = self._stand_in or self._streamed
        if transformer is not None and stage != "denoise":
            transformer.leave(None if self._stand_in else placement.beside[stage])
        if self._guests:
            give_back(self._device)  # else what stays lies in the gaps of what left, and no large piece is whole
        if transformer is not None and stage == "denoise":
            transformer.come(0 if self._stand_in else placement.passes[number].kept_blocks)
        guest = self._guests.get(stage)
        if guest is not None:
            guest.come()
        try:
            yield
        finally:
            if guest is not None:
                guest.leave()

    @torch.inference_mode(False)
    def leave(self) -> None:
        """All that can leaves the device, to come back for its stages: parts in place are so no longer."""
        if self.mode in (None, "resident"):
            self._settle_in_host()
        if self._streamed is not None:
            self._streamed.leave()
        give_back(self._device)

    @contextmanager
    def changing_layers(self) -> Iterator[None]:
        """Within it, layers of the transformer may be changed, wherever they lie."""
        with nullcontext() if self._streamed is None else self._streamed.changing_layers():
            yield

    @contextmanager
    def in_its_place(self, other: Streamed) -> Iterator[None]:
        """Within it, `other` works in the transformer's place, with no block on the device to stay. Parts that left for it
        come back."""
        before, in_place = self.mode, self.held_bytes > 0
        self.leave()
        self._stand_in = other
        try:
            yield
        finally:
            self._stand_in = None
            other.leave()
            if self.mode != before:
                self._undo_leave(before, in_place)

    @torch.inference_mode(False)
    def _undo_leave(self, mode: Mode | None, in_place: bool) -> None:
        """All parts are as they were before `leave`: on the device, if they were in place there. Where memory does not give
        that any more they go on coming for their stages."""
        assert self._streamed is not None
        guests = self._guests.values()
        try:
            if in_place:
                self._streamed.come(len(self._transformer.transformer_blocks))
                for guest in guests:
                    guest.come()
        except torch.OutOfMemoryError:
            log.warning("no memory for all parts in place any more: from now on they come for their stages")
            self._streamed.leave()
            for guest in guests:
                guest.leave()
            return
        self._streamed.detach()
        self._streamed, self._guests, self.mode = None, {}, mode

    def _invite_guests(self) -> None:
        if not self._guests:
            self._guests = {
                "condition": Guest(self._vae.encoder, self._device),
                "decode": Guest(self._vae.decoder, self._device),
            }
            if self._upsampler is not None:
                self._guests["upsample"] = Guest(self._upsampler, self._device)


def bytes_on(model: nn.Module, device: torch.device) -> int:
    """Of its parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device == device)
