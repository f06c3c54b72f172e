"""The operations of the quantised paths, for torch: plain torch on a CPU, Triton kernels on a GPU, opaque to the compiler.

Opaque, since their kernels pick tiles by timing, which only a real call can do, and leave the compiler nothing to fuse.
Where nothing is being compiled they are called straight: the dispatcher takes as long as a launch, and short sequences
wait for launches. Triton is imported by the first call on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch.library import CustomOpDef, custom_op

from ltx_batch.model.quantize import reference


@cache
def _kernel(module: str, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(import_module(f"ltx_batch.model.quantize.kernels.{module}"), name)
    return found


def _operation(reference: Callable[..., Any], module: str) -> tuple[Callable[..., Any], CustomOpDef]:
    """`reference`, or on a GPU the kernel of its name in `module`, and the same as an operation for the compiler."""
    name = reference.__name__
    opaque = custom_op(f"ltx_batch::{name}", reference, mutates_args=(), device_types="cpu")
    opaque.register_kernel("cuda")(lambda *args, **kwargs: _kernel(module, name)(*args, **kwargs))

    def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or type(x) is not torch.Tensor:  # traced, or without numbers
            return opaque(x, *args, **kwargs)
        return (_kernel(module, name) if x.is_cuda else reference)(x, *args, **kwargs)

    return call, opaque


quantize_rows, _quantize_rows = _operation(reference.quantize_rows, "rows")
fp8_rows, _fp8_rows = _operation(reference.fp8_rows, "rows")
quantize_modulated, _quantize_modulated = _operation(reference.quantize_modulated, "rows")
modulate_rows, _modulate_rows = _operation(reference.modulate_rows, "rows")
norm_rotate, _norm_rotate = _operation(reference.norm_rotate, "rotary")
attend_text, _attend_text = _operation(reference.attend_text, "text")
int8_product, _int8_product = _operation(reference.int8_product, "product")


@_quantize_rows.register_fake
def _(x: torch.Tensor, group: int, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantized_like(x)


@_fp8_rows.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantized_like(x, torch.float8_e4m3fn)


@_quantize_modulated.register_fake
def _(
    x: torch.Tensor, table: torch.Tensor, temb: torch.Tensor, slot: int, eps: float, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _quantized_like(x)


@_modulate_rows.register_fake
def _(x: torch.Tensor, table: torch.Tensor, temb: torch.Tensor, slot: int, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


@_norm_rotate.register_fake
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


@_attend_text.register_fake
def _(
    query: torch.Tensor,
    weight: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    eps: float,
) -> torch.Tensor:
    return query.new_empty(query.shape)


@_int8_product.register_fake
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


def _quantized_like(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[0], dtype=torch.float32)
