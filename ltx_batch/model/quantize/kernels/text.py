"""Attention to the prompt: the query's RMS norm over all heads, and attention to a few keys.

A prompt has 256 tokens at most, so a head's scores of some rows fit the registers whole. A program keeps the keys and values of
one head and goes through rows of the query; how long those are over all heads another kernel finds first. A library's kernels
are made for long sequences, and the norm before them reads and writes all of the query: on an H100 the two take 1.4 times as
long, and a program that goes through all heads of a few rows, which needs no second kernel, 1.35 times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ltx_batch.model.quantize import reference
from ltx_batch.model.quantize.kernels.start import start
from ltx_batch.model.quantize.kernels.tune import multiprocessors

_LEAST_WIDTH = 16  # what a tensor core takes
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rms_kernel(
    x_ptr: tl.tensor, inverse_ptr: tl.tensor, channels: tl.tensor, eps: tl.tensor, block: tl.constexpr
) -> None:
    """The inverse root mean square of a row."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, block)
    x = tl.load(x_ptr + row * channels + channel, mask=channel < channels, other=0.0).to(tl.float32)
    tl.store(inverse_ptr + row, tl.rsqrt(tl.sum(x * x, axis=0) / channels + eps))


@triton.jit
def text_kernel(
    query_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
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
    parts: tl.tensor,
    heads: tl.constexpr,
    width: tl.constexpr,
    masked: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_tokens: tl.constexpr,
    ahead: tl.constexpr,
) -> None:
    """One head of each of a clip's tiles of rows that this part has; so many tiles are read `ahead`."""
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads % parts
    clip = (tl.program_id(0) // (heads * parts)).to(tl.int64)
    channel = tl.arange(0, width)
    token = tl.arange(0, tile_tokens)
    there = token < tokens
    bias = tl.zeros((tile_tokens,), dtype=tl.float32)
    if masked:
        bias += tl.load(mask_ptr + clip * mask_stride + token, mask=there, other=0.0).to(tl.float32)
    bias = tl.where(there, bias, float("-inf"))
    at = clip * clip_stride + token[:, None] * key_stride + head * width + channel[None, :]
    if ahead > 1:
        key = tl.load(key_ptr + at, mask=there[:, None], other=0.0)
        value = tl.load(value_ptr + at, mask=there[:, None], other=0.0)
    weight = tl.load(weight_ptr + head * width + channel).to(tl.float32)
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    for tile in tl.range(part, tl.cdiv(rows, tile_rows), parts, num_stages=ahead):
        row = tile * tile_rows + tl.arange(0, tile_rows)
        real = row < rows
        place = (clip * rows + row)[:, None] * (heads * width) + head * width + channel[None, :]
        inverse = tl.load(inverse_ptr + clip * rows + row, mask=real, other=0.0)
        x = tl.load(query_ptr + place, mask=real[:, None], other=0.0).to(tl.float32)
        query = (x * inverse[:, None] * weight[None, :]).to(dtype)
        if ahead == 1:  # where both do not fit at once
            key = tl.load(key_ptr + at, mask=there[:, None], other=0.0)
        scores = tl.dot(query, key.T, out_dtype=tl.float32, input_precision="ieee")
        scores = scores / tl.sqrt(1.0 * width) + bias[None, :]
        shares = tl.exp2((scores - tl.max(scores, axis=1)[:, None]) * _LOG2_E)
        if ahead == 1:
            value = tl.load(value_ptr + at, mask=there[:, None], other=0.0)
        out = tl.dot(shares.to(dtype), value, out_dtype=tl.float32, input_precision="ieee")
        out = out / tl.sum(shares, axis=1)[:, None]
        tl.store(out_ptr + place, out.to(dtype), mask=real[:, None])


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
    inverse = torch.empty(len(query), dtype=torch.float32, device=query.device)
    block = triton.next_power_of_2(channels)
    start(rms_kernel, len(query), (query, inverse), (channels, eps), {"block": block}, warps=8 if block > 2048 else 4)
    out = torch.empty_like(query)
    rows = len(query) // clips
    tile_rows, tile_tokens, ahead, programs = tile_of(tokens)
    tiles = triton.cdiv(rows, tile_rows)
    parts = min(tiles, max(1, programs * multiprocessors(query.device) // (heads * clips))) if programs else tiles
    start(
        text_kernel,
        clips * parts * heads,
        (query, inverse, weight, keys, values, query if mask is None else mask, out),
        (rows, tokens, keys.stride(1), keys.stride(0), 0 if mask is None else mask.stride(0), parts),
        {
            "heads": heads,
            "width": width,
            "masked": mask is not None,
            "tile_rows": tile_rows,
            "tile_tokens": tile_tokens,
            "ahead": ahead,
        },
        warps=4,
    )
    return out


def tile_of(tokens: int) -> tuple[int, int, int, int]:
    """Rows of a tile, the tokens of a prompt as a power of two, tiles that are under way at once, and programs for each
    multiprocessor, 0 for one a tile: what 99 KiB of shared memory and the registers hold."""
    tile_tokens = max(_LEAST_WIDTH, triton.next_power_of_2(tokens))
    if tile_tokens <= 64:
        return 64, tile_tokens, 3, 4
    return 64 if tile_tokens == 128 else 32, tile_tokens, 1, 0
