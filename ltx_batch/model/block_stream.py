"""Blocks that run one after the other, with room on the device for some of them: the others come from host memory.

Two slots hold those that come: while one works, the next is copied into the other, on a stream of its own. Blocks that stay
are spread evenly, so that every copy has as much time as there is; they come ahead of their first turn like the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ltx_batch.model.packed import Packed
from ltx_batch.model.placement import SLOTS, staying


@dataclass(slots=True)
class _Slot:
    """A place on the device, and the block that is there or on its way. `filled` and `used` are events on a GPU: the copy is
    there; its work is done."""

    buffer: torch.Tensor
    block: int | None = None
    filled: Any = None
    used: Any = None


class BlockStream:
    """Takes the tensors of `blocks` over into host memory. Before the first forward `keep` says how many stay on the device.

    Forward hooks do the rest, until `detach`, so the blocks may be of any kind, but their order in a forward must not change. What is
    compiled of a block must leave its hooks outside: its `forward`, not the block. Layers that a block names in
    `parked_layers` wait in host memory too, and the block brings them itself.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._blocks = list(blocks)
        self._packs = [self._pack(block) for block in blocks]
        self._parked = [Packed(nn.ModuleList(_parked(block)), device) for block in blocks]
        self._staying: dict[int, _Slot] = {}
        self._slots: list[_Slot] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._hooks: list[RemovableHandle] = []
        for index, block in enumerate(blocks):
            self._hooks.append(block.register_forward_pre_hook(lambda *_, index=index: self._before(index)))
            self._hooks.append(block.register_forward_hook(lambda *_, index=index: self._after(index)))

    @property
    def held_bytes(self) -> int:
        """What is taken of the device."""
        return sum(slot.buffer.numel() for slot in (*self._staying.values(), *self._slots))

    def keep(self, count: int) -> None:
        """Have `count` blocks stay on the device, from their next turn on, and two slots for the others."""
        chosen = self._chosen(count)
        wanted = SLOTS if len(chosen) < len(self._packs) else 0
        if chosen == self._staying.keys() and len(self._slots) == wanted:
            return
        self.leave(count)
        for index in sorted(chosen - self._staying.keys()):
            self._staying[index] = self._make_slot(self._packs[index].size_bytes)
        largest = max((len(pack.host) for index, pack in enumerate(self._packs) if index not in chosen), default=0)
        self._slots = [self._make_slot(largest) for _ in range(wanted)]

    def leave(self, count: int = 0) -> None:
        """Give the device back, the slots with it; of blocks that stay now, those stay that `keep(count)` would
        choose. Until the next `keep`, a forward is one in host memory."""
        chosen = self._chosen(count)
        self._staying = {index: slot for index, slot in self._staying.items() if index in chosen}
        for index, pack in enumerate(self._packs):
            if index not in self._staying:
                pack.point_at(pack.host)
        if self._copies is not None:  # a copy ahead may still write to a slot
            torch.cuda.current_stream(self._device).wait_stream(self._copies)
        self._slots = []

    def repack(self) -> None:
        """Take over what has been added to the blocks or taken from them since."""
        self.leave()
        for index, block in enumerate(self._blocks):  # one by one: all at once would be in host memory twice
            self._packs[index] = self._pack(block)

    def detach(self) -> None:
        """Let go of the blocks: those that stay are on the device, the others where they are. Nothing else may be called
        after it."""
        for index in self._staying:
            self._bring(index)
        for hook in self._hooks:  # blocks that hold us, and we them, would wait for Python to look for cycles
            hook.remove()

    def _chosen(self, count: int) -> set[int]:
        return staying([pack.size_bytes for pack in self._packs], count)

    def _pack(self, block: nn.Module) -> Packed:
        return Packed(block, self._device, without=_parked(block))

    def _before(self, index: int) -> None:
        if index not in self._staying and not self._slots:  # after `leave`, when blocks work in host memory
            return
        came = self._slot_of(index) is not None
        slot = self._bring(index)
        # Whoever brought it has looked further ahead. Not so after `keep`: one copy is late then.
        if came and index in self._staying:
            return
        count = len(self._packs)
        for step in range(1, count):  # after the last block the first, for the next forward
            following = (index + step) % count
            stays = following in self._staying
            if self._slot_of(following) is None and (stays or self._slots):
                self._fetch(following, beside=slot)
            if not stays:
                break

    def _bring(self, index: int) -> _Slot:
        """Have the block work on the device, now."""
        slot = self._slot_of(index) or self._fetch(index)
        if self._copies is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.filled)
        self._packs[index].point_at(slot.buffer)
        return slot

    def _after(self, index: int) -> None:
        for slot in self._slots:
            if slot.block == index and slot.used is not None:
                slot.used.record(torch.cuda.current_stream(self._device))

    def _slot_of(self, index: int) -> _Slot | None:
        """Where the block is, or is on its way to."""
        slots = [self._staying[index]] if index in self._staying else self._slots
        return next((slot for slot in slots if slot.block == index), None)

    def _fetch(self, index: int, beside: _Slot | None = None) -> _Slot:
        slot = self._staying.get(index) or next(slot for slot in self._slots if slot is not beside)
        slot.block = index
        host = self._packs[index].host
        if self._copies is None:
            slot.buffer[: len(host)].copy_(host)
            return slot
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(slot.used)
            slot.buffer[: len(host)].copy_(host, non_blocking=True)
            slot.filled.record(self._copies)
        return slot

    def _make_slot(self, size_bytes: int) -> _Slot:
        slot = _Slot(self._allocate(size_bytes))
        if self._copies is not None:
            slot.filled, slot.used = torch.cuda.Event(), torch.cuda.Event()
            slot.used.record(torch.cuda.current_stream(self._device))  # what had that memory before is still at work
        return slot

    def _allocate(self, count: int) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.empty(count, dtype=torch.uint8, device=self._device)


def _parked(block: nn.Module) -> Sequence[nn.Module]:
    return getattr(block, "parked_layers", ())
