"""Launches of a kernel that was launched before, without Triton's second look at every argument.

Short sequences wait for launches: a block takes some fourteen of them, and each costs more time in Python than on the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_ALIGN_BYTES = 16  # what Triton counts on where an address is a multiple of it
# Compiled kernels by all that Triton makes them of: a GPU, types, numbers and constants.
_known: dict[tuple[Any, ...], Any] = {}


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
    only_build: bool = False,
) -> None:
    """Launch so many programs of a kernel, or only compile what that launch would take.

    The kernel's parameters are `descriptors`, `tensors`, `numbers` and `constants`, in this order. Products and sums are
    rounded one by one, as on the CPU, so that all launches compute the same bits.
    """
    device = tensors[0].device
    arguments = (*descriptors, *tensors, *numbers)
    if only_build or device.type != "cuda":  # not a GPU: Triton's interpreter
        options = {**constants, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
        if only_build:
            kernel.warmup(*arguments, grid=(programs,), **options)
        else:
            kernel[(programs,)](*arguments, **options)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(kernel, programs, tensors, numbers, constants, descriptors=descriptors, warps=warps, stages=stages)
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
    built = kernel[(programs,)](*arguments, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=False)
    if aligned:
        _known[key] = built
