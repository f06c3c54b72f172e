"""Launches of kernels, the first one and all later ones.

A kernel is compiled where it is first launched. Those of a block are compiled side by side before its first call, in place of
one after the other. Later launches go without Triton's second look at every argument: short sequences wait for launches, as a
block takes some fourteen of them, and each costs more time in Python than on the GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import triton

_ALIGN_BYTES = 16  # what Triton counts on where an address is a multiple of it
# Compiled kernels by all that Triton makes them of: a GPU, types, numbers and constants.
_known: dict[tuple[Any, ...], Any] = {}
# Kernels that are being compiled, each with its GPU; None: launches are made.
_building: ContextVar[list[tuple[Any, int]] | None] = ContextVar("building", default=None)


@contextmanager
def only_building() -> Iterator[None]:
    """Launches are not made within it: their kernels are compiled, side by side, and are ready when it ends. What a compiler
    refuses is found out when it is launched."""
    warmed: list[tuple[Any, int]] = []
    token = _building.set(warmed)
    try:
        with (
            ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            yield
    finally:
        _building.reset(token)
        for kernel, gpu in warmed:
            _forget_failed(kernel.device_caches[gpu][0])


def _forget_failed(compiled: dict[Any, Any]) -> None:
    """Triton keeps what is still being compiled in the place of a kernel, and with it an error that may have passed."""
    for key, kernel in list(compiled.items()):
        if isinstance(kernel, triton.FutureKernel):
            del compiled[key]


def building() -> bool:
    """Whether this is within `only_building`."""
    return _building.get() is not None


def start(
    kernel: Any,
    programs: int,
    tensors: Sequence[torch.Tensor],
    numbers: tuple[int | float, ...],
    constants: Mapping[str, Any],
    *,
    descriptors: tuple[Any, ...] = (),
    warps: int,
    stages: int = 3,
) -> None:
    """Launch so many programs of a kernel, or only compile what that launch would take: see `only_building`.

    The kernel's parameters are `descriptors`, `tensors`, `numbers` and `constants`, in this order. Products and sums are
    rounded one by one, as on the CPU, so that all launches compute the same bits.
    """
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(kernel, programs, tensors, numbers, constants, descriptors=descriptors, warps=warps, stages=stages)
        return
    arguments = (*descriptors, *tensors, *numbers)
    options = {**constants, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    warmed = _building.get()
    if warmed is not None:
        warmed.append((kernel, device.index))
        kernel.warmup(*arguments, grid=(programs,), **options)
        return
    if device.type != "cuda":  # Triton's interpreter
        kernel[(programs,)](*arguments, **options)
        return
    values = tuple(constants.values())
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    key = (id(kernel), device.index, warps, stages, numbers, values, tuple([tensor.dtype for tensor in tensors]))
    aligned = addresses % _ALIGN_BYTES == 0  # else Triton makes another kernel of it
    known = _known.get(key) if aligned else None
    if known is not None:
        known[(programs, 1, 1)](*arguments, *values)
        return
    built = kernel[(programs,)](*arguments, **options)
    if aligned and not isinstance(built, triton.FutureKernel):  # of another thread that is building
        _known[key] = built
