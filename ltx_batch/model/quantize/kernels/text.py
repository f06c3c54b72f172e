"""Attention to the prompt: the query's RMS norm over all heads, and attention to a few keys, in one pass over the query.

A prompt has 256 tokens at most, so a head's scores of some rows fit the registers whole, and its keys and values come from
the cache. A library's kernels are made for long sequences, and the norm before them reads and writes all of the query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ltx_batch.model.quantize import reference
from ltx_batch.model.quantize.kernels.start import start

_LEAST_WIDTH = 16  # what a tensor core takes
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def text_kernel(
    query_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    tokens: tl.tensor,
    key_stride: tl.tensor,
    clip_stride: tl.tensor,
    mask_stride: tl.tensor,
    eps: tl.tensor,
    heads: tl.constexpr,
    width: tl.constexpr,
    masked: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_tokens: tl.constexpr,
) -> None:
    """Some of a clip's `rows`, all heads of them."""
    tiles = tl.cdiv(rows, tile_rows)
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * tile_rows + tl.arange(0, tile_rows)
    channel = tl.arange(0, width)
    real = (row < rows)[:, None]
    at = (clip * rows + row)[:, None] * (heads * width) + channel[None, :]
    squares = tl.zeros((tile_rows, width), dtype=tl.float32)
    for head in range(heads):
        x = tl.load(query_ptr + at + head * width, mask=real, other=0.0).to(tl.float32)
        squares += x * x
    inverse_rms = tl.rsqrt(tl.sum(squares, axis=1) / (heads * width) + eps)
    token = tl.arange(0, tile_tokens)
    there = token < tokens
    bias = tl.zeros((tile_tokens,), dtype=tl.float32)
    if masked:
        bias += tl.load(mask_ptr + clip * mask_stride + token, mask=there, other=0.0).to(tl.float32)
    bias = tl.where(there, bias, float("-inf"))
    keys = clip * clip_stride + token[:, None] * key_stride + channel[None, :]
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    for head in range(heads):
        x = tl.load(query_ptr + at + head * width, mask=real, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + head * width + channel).to(tl.float32)
        query = (x * inverse_rms[:, None] * weight[None, :]).to(dtype)
        key = tl.load(key_ptr + keys + head * width, mask=there[:, None], other=0.0)
        scores = tl.dot(query, key.T, out_dtype=tl.float32, input_precision="ieee")
        scores = scores / tl.sqrt(1.0 * width) + bias[None, :]
        shares = tl.exp2((scores - tl.max(scores, axis=1)[:, None]) * _LOG2_E)
        value = tl.load(value_ptr + keys + head * width, mask=there[:, None], other=0.0)
        out = tl.dot(shares.to(dtype), value, out_dtype=tl.float32, input_precision="ieee")
        out = out / tl.sum(shares, axis=1)[:, None]
        tl.store(out_ptr + at + head * width, out.to(dtype), mask=real)


def attend_text(
    query: torch.Tensor,
    weight: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    heads: int,
    eps: float,
) -> torch.Tensor:
    """`reference.attend_text`."""
    clips, tokens, channels = keys.shape
    width = channels // heads
    if width < _LEAST_WIDTH or width & (width - 1):
        return reference.attend_text(query, weight, keys, values, mask, heads, eps)
    assert query.is_contiguous() and keys.stride() == values.stride() and keys.stride(2) == 1
    out = torch.empty_like(query)
    rows = len(query) // clips
    tile_rows, tile_tokens, stages = tile_of(tokens)
    start(
        text_kernel,
        clips * triton.cdiv(rows, tile_rows),
        (query, weight, keys, values, query if mask is None else mask, out),
        (rows, tokens, keys.stride(1), keys.stride(0), 0 if mask is None else mask.stride(0), eps),
        {
            "heads": heads,
            "width": width,
            "masked": mask is not None,
            "tile_rows": tile_rows,
            "tile_tokens": tile_tokens,
        },
        warps=4,
        stages=stages,
    )
    return out


def tile_of(tokens: int) -> tuple[int, int, int]:
    """Rows of a program, the tokens of a prompt as a power of two, and stages: what 99 KiB of shared memory hold."""
    tile_tokens = max(_LEAST_WIDTH, triton.next_power_of_2(tokens))
    return (64, tile_tokens, 2) if tile_tokens <= 64 else (64 if tile_tokens == 128 else 32, tile_tokens, 1)
