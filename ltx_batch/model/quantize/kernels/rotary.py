"""RMS norm over all heads and the rotary embedding of query and key, one row of both a program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ltx_batch.model.quantize.kernels.start import start
from ltx_batch.model.quantize.rope import ONE


@triton.jit
def _turn(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    pairs: tl.constexpr,
) -> None:
    channel = tl.arange(0, 2 * pairs)
    inside = channel < channels
    x = tl.load(x_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=0) / channels + eps) * weight
    real, imaginary = x.reshape(pairs, 2).split()
    turned = tl.join(real * cos - imaginary * sin, imaginary * cos + real * sin).reshape(2 * pairs)
    tl.store(out_ptr + channel, turned.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotary_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    query_weight_ptr: tl.tensor,
    key_weight_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    query_out_ptr: tl.tensor,
    key_out_ptr: tl.tensor,
    channels: tl.tensor,
    real_pairs: tl.tensor,
    stride: tl.tensor,
    rope_rows: tl.tensor,
    eps: tl.tensor,
    part: tl.tensor,
    pairs: tl.constexpr,
) -> None:
    """`part` is what 1 in a table stands for."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, pairs)
    at = row % rope_rows * real_pairs + pair
    cos = tl.load(cos_ptr + at, mask=pair < real_pairs, other=0).to(tl.float32) * part
    sin = tl.load(sin_ptr + at, mask=pair < real_pairs, other=0).to(tl.float32) * part
    _turn(query_ptr + row * stride, query_weight_ptr, query_out_ptr + row * channels, cos, sin, channels, eps, pairs)
    _turn(key_ptr + row * stride, key_weight_ptr, key_out_ptr + row * channels, cos, sin, channels, eps, pairs)


def norm_rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weight: torch.Tensor,
    key_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.norm_rotate`."""
    rows, channels = query.shape
    assert query.stride() == key.stride() and query.stride(1) == 1 and cos.is_contiguous() and sin.is_contiguous()
    outs = [torch.empty(query.shape, dtype=query.dtype, device=query.device) for _ in range(2)]
    pairs = channels // 2
    start(
        rotary_kernel,
        rows,
        (query, key, query_weight, key_weight, cos, sin, *outs),
        (channels, pairs, query.stride(0), cos.shape[0], eps, 1 / ONE),
        {"pairs": 1 << (pairs - 1).bit_length()},
        warps=4 if channels < 4096 else 16,
    )
    return outs[0], outs[1]
