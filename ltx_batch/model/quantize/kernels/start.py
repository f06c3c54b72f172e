"""Launches of a kernel that was launched before: a third of the time that Triton takes to look at all arguments again.

Short sequences wait for launches: a block takes some fourteen of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

# Compiled kernels by all that Triton makes them of: a GPU, constants, and of each argument what it is specialised on.
_known: dict[tuple[Any, ...], Any] = {}


def start(
    kernel: Any,
    programs: int,
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    *,
    device: torch.device,
    warps: int,
    stages: int = 3,
    only_build: bool = False,
) -> None:
    """Launch so many programs of a kernel, or only compile what that launch would take.

    `constants` are the kernel's last parameters, in their order. Products and sums are rounded one by one, as on the CPU,
    so that all launches compute the same bits.
    """
    options = {**constants, "num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if only_build:
        kernel.warmup(*arguments, grid=(programs,), **options)
        return
    if device.type != "cuda":  # Triton's interpreter
        kernel[(programs,)](*arguments, **options)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(kernel, programs, arguments, constants, device=device, warps=warps, stages=stages)
        return
    key = (id(kernel), device.index, warps, stages, *constants.values(), *map(_kind, arguments))
    known = _known.get(key)
    if known is None:
        _known[key] = kernel[(programs,)](*arguments, **options)
    else:
        known[(programs, 1, 1)](*arguments, *constants.values())


def _kind(argument: Any) -> Any:
    """What a compiled kernel may count on: a number itself, of a tensor its type and where it begins."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    return type(argument), argument
