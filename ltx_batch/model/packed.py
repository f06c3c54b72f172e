"""A module's tensors side by side in one buffer of host memory, so that they come to a device in a single copy.

Tensors are moved, never layers rebuilt: whatever holds a tensor as a parameter, as a buffer, or as bitsandbytes holds it,
can be packed. On a CPU "the device" is another buffer of the same memory, and everything else is as on a GPU.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_ALIGN_BYTES = 256
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module holds a tensor: `holder`'s attribute, its buffer, or the data of a parameter."""

    holder: Any
    name: str
    kind: str

    def get(self) -> torch.Tensor:
        if self.kind == "data":
            return self.holder.data
        found = self.holder._buffers[self.name] if self.kind == "buffer" else getattr(self.holder, self.name)
        assert isinstance(found, torch.Tensor)
        return found

    def set(self, tensor: torch.Tensor) -> None:
        if self.kind == "data":
            self.holder.data = tensor
        elif self.kind == "buffer":
            self.holder._buffers[self.name] = tensor
        else:
            setattr(self.holder, self.name, tensor)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the pack: all places that share it, where it begins in the buffer, and its form."""

    places: tuple[_Place, ...]
    start: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        count = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)) + 1
        stored = buffer[self.start : self.start + count * self.dtype.itemsize].view(self.dtype)
        return stored.as_strided(self.shape, self.stride)


class Packed:
    """The tensors of `module`, which lie in `host` from now on; `point_at` says from which copy the module works.

    `size_bytes` is what a copy takes. Host memory is page-locked where the device is a GPU, so that copies run beside
    the computing.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, without: Sequence[nn.Module] = ()) -> None:
        """`without` are modules inside of `module` that are no part of the pack."""
        with torch.inference_mode(False):
            self._entries, self.size_bytes = _lay_out(module, without)
            self.host = torch.empty(self.size_bytes, dtype=torch.uint8)
            if device.type == "cuda":
                _lock_pages(self.host)
            for entry in self._entries:
                entry.view(self.host).copy_(entry.places[0].get())
            self._at: torch.Tensor | None = None
            self.point_at(self.host)

    @property
    def at_home(self) -> bool:
        return self._at is self.host

    def point_at(self, buffer: torch.Tensor) -> None:
        """Have the module work from `buffer`, uint8 and as large as `host` or larger, which holds or will hold a copy."""
        if self._at is buffer:
            return
        with torch.inference_mode(False):
            for entry in self._entries:
                view = entry.view(buffer)
                for place in entry.places:
                    place.set(view)
        self._at = buffer


def _lay_out(module: nn.Module, without: Sequence[nn.Module]) -> tuple[list[_Entry], int]:
    shared: dict[tuple[Any, ...], list[_Place]] = {}
    left_out = {id(inner) for outer in without for inner in outer.modules()}
    for place in _places(layer for layer in module.modules() if id(layer) not in left_out):
        tensor = place.get()
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        shared.setdefault(key if tensor.numel() else (id(place),), []).append(place)
    entries, start = [], 0
    # Large ones first, in their order: weights of one shape, which a kernel may take as one matrix, lie without a gap.
    for places in sorted(shared.values(), key=lambda places: -places[0].get().nbytes):
        tensor = places[0].get()
        dense = tensor.numel() > 0 and torch.ops.aten.is_non_overlapping_and_dense(tensor)
        stride = tensor.stride() if dense else torch.empty(tensor.shape, device="meta").stride()
        entries.append(_Entry(tuple(places), start, tensor.dtype, tensor.shape, stride))
        start += -(-tensor.numel() * tensor.element_size() // _ALIGN_BYTES) * _ALIGN_BYTES
    return entries, start


def _places(layers: Iterable[nn.Module]) -> Iterator[_Place]:
    for layer in layers:
        if type(layer).__name__ == "Linear8bitLt":
            yield from _bitsandbytes_places(layer)
        for parameter in layer._parameters.values():
            if parameter is not None:
                yield _Place(parameter, "", "data")
        for name, buffer in layer._buffers.items():
            if buffer is not None:
                yield _Place(layer, name, "buffer")


def _bitsandbytes_places(layer: Any) -> Iterator[_Place]:
    """Its rows' scales are neither parameter nor buffer, and the first forward would move them once more."""
    if layer.weight.CB is not None:
        layer.init_8bit_state()
    for name in ("CB", "SCB"):
        if getattr(layer.state, name) is not None:
            yield _Place(layer.state, name, "attribute")


def _lock_pages(buffer: torch.Tensor) -> None:
    """Page-lock memory that is there. torch's own pinned memory comes in powers of two: nearly twice of a 13B block.

    Memory that goes away while it is copied from is safe: to unlock it waits for copies under way (seen on an H100).
    """
    if buffer.numel() == 0:
        return
    cuda = torch.cuda.cudart()
    pointer = buffer.data_ptr()
    if int(cuda.cudaHostRegister(pointer, buffer.numel(), 0)) == 0:
        weakref.finalize(buffer.untyped_storage(), cuda.cudaHostUnregister, pointer)
        return
    log.warning(
        "%.1f GiB of host memory could not be page-locked: copies to the GPU will wait for each other",
        buffer.numel() / 2**30,
    )
