"""The operations of the int8 path, for torch: plain torch on a CPU, Triton kernels on a GPU, opaque to the compiler.

Opaque, since their kernels pick tiles by timing, which only a real call can do, and leave the compiler nothing to fuse.
Triton is imported by the first call on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch.library import CustomOpDef, custom_op

from ltx_batch.model.quantize import reference


def _operation(reference: Callable[..., Any], kernels: str) -> CustomOpDef:
    """`reference` as an operation of its name; the kernel is the function of that name in module `kernels`."""
    name = reference.__name__

    def on_cuda(*args: Any, **kwargs: Any) -> Any:
        module = import_module(f"ltx_batch.model.quantize.kernels.{kernels}")
        return getattr(module, name)(*args, **kwargs)

    made = custom_op(f"ltx_batch::{name}", reference, mutates_args=(), device_types="cpu")
    made.register_kernel("cuda")(on_cuda)
    return made


quantize_rows = _operation(reference.quantize_rows, "rows")
quantize_modulated = _operation(reference.quantize_modulated, "rows")
modulate_rows = _operation(reference.modulate_rows, "rows")
norm_rotate = _operation(reference.norm_rotate, "rotary")
int8_product = _operation(reference.int8_product, "product")


@quantize_rows.register_fake
def _(x: torch.Tensor, group: int, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantized_like(x)


@quantize_modulated.register_fake
def _(
    x: torch.Tensor, table: torch.Tensor, temb: torch.Tensor, slot: int, eps: float, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantized_like(x)


@modulate_rows.register_fake
def _(x: torch.Tensor, table: torch.Tensor, temb: torch.Tensor, slot: int, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


@norm_rotate.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape)


@int8_product.register_fake
def _(
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    temb: torch.Tensor | None = None,
    slot: int = 0,
) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], sum(weight.shape[0] for weight in weights), dtype=dtype)


def _quantized_like(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], dtype=torch.float32)
