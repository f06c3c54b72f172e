"""What the int8 kernels compute, in plain torch: how the CPU runs, and what the kernels are tested against.

All of it is fp32 between the tensors that go in and come out, and every row is on its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import gelu as torch_gelu
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from ltx_batch.model.quantize.hadamard import rotate
from ltx_batch.model.quantize.rope import floating

LIMIT = 127  # symmetric: -128 is never used
FP8_LIMIT = 448  # of e4m3, which has no infinity


def quantize_weight(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [N, K] and the fp32 scales [N] of its rows; `group` inputs are rotated together, 0 for none."""
    return _round_rows(rotate(weight.float(), group))


def quantize_rows(x: torch.Tensor, group: int, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `x` [M, K] as int8 [M, K] with fp32 scales [M], with GELU (its tanh form) or rotation before that."""
    if gelu:
        x = torch_gelu(x.float(), approximate="tanh").to(x.dtype)
    return _round_rows(rotate(x, group))


def fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `x` [M, K] as e4m3 [M, K] with fp32 scales [M]."""
    largest = x.abs().amax(-1).float()
    largest = torch.where(largest == 0, 1.0, largest)
    # A number over a tensor would be that number times a rounded reciprocal, and many of bf16's lie between two of e4m3.
    limit = torch.full_like(largest, FP8_LIMIT)
    return (x.float() * (limit / largest)[:, None]).to(torch.float8_e4m3fn), largest / limit


def modulate_rows(x: torch.Tensor, table: torch.Tensor, temb: torch.Tensor, slot: int, eps: float) -> torch.Tensor:
    """RMS norm and adaLN: `x` [M, K] times 1 + scale plus shift, in x's dtype.

    Shift and scale are lines `slot` and `slot + 1` of `table` [6, K] plus the same of `temb` [R, 6 * K], whose rows hold
    for M / R rows of `x` each.
    """
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    shift, scale = ada(table, temb, slot), ada(table, temb, slot + 1)
    rows = normed.unflatten(0, (len(temb), -1))
    return (rows * (1 + scale[:, None]) + shift[:, None]).flatten(0, 1).to(x.dtype)


def quantize_modulated(
    x: torch.Tensor, table: torch.Tensor, temb: torch.Tensor, slot: int, eps: float, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` of `modulate_rows`."""
    return quantize_rows(modulate_rows(x, table, temb, slot, eps), group)


def ada(table: torch.Tensor, temb: torch.Tensor, slot: int) -> torch.Tensor:
    """Line `slot` of the block's table plus the same of the time embedding: fp32 [R, K]."""
    return table[slot].float() + temb.unflatten(1, table.shape)[:, slot].float()


def int8_product(
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
    """rows [M, K] @ weight [N, K].T in int32, times both scales, plus bias: [M, N], or [M, 3 * N] of three weights.

    With a `residual` [M, N] it is added, after a gate, line `slot` of `table` and `temb`, where these are given.
    `biases` may be empty.
    """
    parts = []
    for index, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        part = torch._int_mm(rows, weight.T).float() * row_scales[:, None] * scale
        parts.append(part + biases[index].float() if biases else part)
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if table is not None and temb is not None:
        out = (out.unflatten(0, (len(temb), -1)) * ada(table, temb, slot)[:, None]).flatten(0, 1)
    return (out if residual is None else out + residual.float()).to(dtype)


def norm_rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMS norm over all heads, then the rotary embedding: query and key [M, D], which may be columns of a wider tensor.

    `cos` and `sin` are `rope`'s [R, D / 2], one number a pair of channels, and hold again every R rows.
    """
    cos, sin = floating(cos), floating(sin)
    return _norm_rotate(query, query_weight, cos, sin, eps), _norm_rotate(key, key_weight, cos, sin, eps)


def _norm_rotate(
    x: torch.Tensor, weight: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> torch.Tensor:
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps) * weight.float()
    real, imaginary = normed.view(-1, len(cos), cos.shape[1], 2).unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
    return turned.view(x.shape).to(x.dtype)


def attend_text(
    query: torch.Tensor,
    weight: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    eps: float,
) -> torch.Tensor:
    """RMS norm over all heads of `query` [B * N, D], then its attention to `keys` and `values` [B, T, D], with a `mask`
    [B, 1, T] that is added to the scores of all heads: [B * N, D]."""
    normed = rms_norm(query, (query.shape[1],), weight, eps).unflatten(0, (len(keys), -1))
    query, keys, values = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (normed, keys, values))
    out = scaled_dot_product_attention(query, keys, values, attn_mask=None if mask is None else mask[:, None])
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


def _round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = x.abs().amax(-1)
    largest = torch.where(largest == 0, 1.0, largest)  # a row of zeros stays one
    rounded = torch.round(x * (LIMIT / largest)[..., None])
    return rounded.to(torch.int8), largest / LIMIT
