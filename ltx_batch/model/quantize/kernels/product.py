"""The int8 product: row scales, column scales, bias, gate and residual on the way out of the registers.

Up to three weights of one size share a launch, so that query, key and value are one product of the rows that they all
take. Two kernels compute the same bits: one for every GPU since Ampere, and one for Hopper's tensor copy engine, which
stays on a multiprocessor and reads the next tile's operands while it writes this one out. It takes several weights only
where they lie behind each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ltx_batch.model.quantize.kernels.start import start
from ltx_batch.model.quantize.kernels.tune import Tuner, bucket, multiprocessors


@triton.jit
def _place(tile: tl.tensor, tiles_down: tl.tensor, tiles_across: tl.tensor, group: tl.constexpr) -> tl.tensor:
    """A tile's row and column in the grid of tiles, `group` rows of tiles at a time, down before across."""
    in_group = group * tiles_across
    top = tile // in_group * group
    height = min(tiles_down - top, group)
    return top + tile % in_group % height, tile % in_group // height


@triton.jit
def _pick(part: tl.tensor, one: tl.tensor, two: tl.tensor, three: tl.tensor) -> tl.tensor:
    return tl.where(part == 0, one, tl.where(part == 1, two, three))


@triton.jit
def _finish(
    sums: tl.tensor,
    top: tl.tensor,
    left: tl.tensor,
    part: tl.tensor,
    row_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    table_ptr: tl.tensor,
    temb_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    out_stride: tl.tensor,
    span: tl.tensor,
    temb_stride: tl.tensor,
    bias: tl.constexpr,
    gate: tl.constexpr,
    residual: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """`gate`: 0 none, 1 one line for all rows, 2 a line for each `span` rows."""
    row = tl.arange(0, tile_rows)
    column = left + tl.arange(0, tile_columns)
    real_row, real_column = top + row < rows, column < columns
    mask = real_row[:, None] & real_column[None, :]
    out = sums.to(tl.float32) * tl.load(row_scale_ptr + top + row, mask=real_row, other=0.0)[:, None]
    out *= tl.load(scale_ptr + column, mask=real_column, other=0.0)[None, :]
    if bias:
        out += tl.load(bias_ptr + column, mask=real_column, other=0.0).to(tl.float32)[None, :]
    if gate > 0:
        line = tl.load(table_ptr + column, mask=real_column, other=0.0).to(tl.float32)[None, :]
        if gate == 1:
            line += tl.load(temb_ptr + column, mask=real_column, other=0.0).to(tl.float32)[None, :]
        else:
            first = top // span
            lines = temb_ptr + first.to(tl.int64) * temb_stride
            offset = ((top + row) // span - first)[:, None] * temb_stride + column[None, :]
            line += tl.load(lines + offset, mask=mask, other=0.0).to(tl.float32)
        out *= line
    # Within a tile 32 bits are enough for offsets, and half the registers.
    start = top.to(tl.int64) * out_stride
    offset = row[:, None] * out_stride + (part * columns + column)[None, :]
    if residual:
        out += tl.load(residual_ptr + start + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + offset, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish_halves(
    sums: tl.tensor,
    top: tl.tensor,
    left: tl.tensor,
    part: tl.tensor,
    row_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    table_ptr: tl.tensor,
    temb_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    out_stride: tl.tensor,
    span: tl.tensor,
    temb_stride: tl.tensor,
    bias: tl.constexpr,
    gate: tl.constexpr,
    residual: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """Left half, then right: a whole tile of fractions beside the residual would not fit the registers."""
    half: tl.constexpr = tile_columns // 2
    one, two = sums.reshape(tile_rows, 2, half).permute(0, 2, 1).split()
    _finish(one, top, left, part, row_scale_ptr, scale_ptr, bias_ptr, residual_ptr, table_ptr, temb_ptr, out_ptr, rows, columns, out_stride, span, temb_stride, bias, gate, residual, tile_rows, half)  # fmt: skip
    _finish(two, top, left + half, part, row_scale_ptr, scale_ptr, bias_ptr, residual_ptr, table_ptr, temb_ptr, out_ptr, rows, columns, out_stride, span, temb_stride, bias, gate, residual, tile_rows, half)  # fmt: skip


@triton.jit
def product_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    weight2_ptr: tl.tensor,
    weight3_ptr: tl.tensor,
    row_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    scale2_ptr: tl.tensor,
    scale3_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    bias2_ptr: tl.tensor,
    bias3_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    table_ptr: tl.tensor,
    temb_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    channels: tl.tensor,
    out_stride: tl.tensor,
    span: tl.tensor,
    temb_stride: tl.tensor,
    parts: tl.constexpr,
    bias: tl.constexpr,
    gate: tl.constexpr,
    residual: tl.constexpr,
    even: tl.constexpr,
    group: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    depth: tl.constexpr,
) -> None:
    """One tile a program. `even`: the channels are a multiple of `depth`."""
    across = tl.cdiv(columns, tile_columns)
    down, right = _place(tl.program_id(0), tl.cdiv(rows, tile_rows), across * parts, group)
    part = right // across
    top, left = down * tile_rows, right % across * tile_columns
    if parts > 1:
        weight_ptr = _pick(part, weight_ptr, weight2_ptr, weight3_ptr)
        scale_ptr = _pick(part, scale_ptr, scale2_ptr, scale3_ptr)
        bias_ptr = _pick(part, bias_ptr, bias2_ptr, bias3_ptr)
    # Rows and columns beyond the end read the last one, and are never written.
    row = tl.minimum(tl.arange(0, tile_rows), rows - 1 - top)
    column = tl.minimum(left + tl.arange(0, tile_columns), columns - 1)
    channel = tl.arange(0, depth)
    x_ptrs = x_ptr + top.to(tl.int64) * channels + row[:, None] * channels + channel[None, :]
    weight_ptrs = weight_ptr + column[None, :] * channels + channel[:, None]
    sums = tl.zeros((tile_rows, tile_columns), dtype=tl.int32)
    for step in range(tl.cdiv(channels, depth)):
        if even:
            x, weight = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            inside = channel < channels - step * depth
            x = tl.load(x_ptrs, mask=inside[None, :], other=0)
            weight = tl.load(weight_ptrs, mask=inside[:, None], other=0)
        sums = tl.dot(x, weight, sums, out_dtype=tl.int32)
        x_ptrs += depth
        weight_ptrs += depth
    _finish_halves(sums, top, left, part, row_scale_ptr, scale_ptr, bias_ptr, residual_ptr, table_ptr, temb_ptr, out_ptr, rows, columns, out_stride, span, temb_stride, bias, gate, residual, tile_rows, tile_columns)  # fmt: skip


@triton.jit
def described_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    row_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    scale2_ptr: tl.tensor,
    scale3_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    bias2_ptr: tl.tensor,
    bias3_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    table_ptr: tl.tensor,
    temb_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    channels: tl.tensor,
    out_stride: tl.tensor,
    span: tl.tensor,
    temb_stride: tl.tensor,
    parts: tl.constexpr,
    bias: tl.constexpr,
    gate: tl.constexpr,
    residual: tl.constexpr,
    group: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    depth: tl.constexpr,
) -> None:
    """Tile after tile a program. `x` and `weight` are descriptors; `weight` [parts * columns, channels]."""
    across = tl.cdiv(columns, tile_columns)
    tiles_down = tl.cdiv(rows, tile_rows)
    steps = tl.cdiv(channels, depth)
    for tile in tl.range(tl.program_id(0), tiles_down * across * parts, tl.num_programs(0), flatten=True):
        down, right = _place(tile, tiles_down, across * parts, group)
        part = right // across
        top, left = down * tile_rows, right % across * tile_columns
        sums = tl.zeros((tile_rows, tile_columns), dtype=tl.int32)
        for step in range(steps):
            one = x.load([top, step * depth])
            two = weight.load([part * columns + left, step * depth])
            sums = tl.dot(one, two.T, sums, out_dtype=tl.int32)
        scales = _pick(part, scale_ptr, scale2_ptr, scale3_ptr)
        biases = _pick(part, bias_ptr, bias2_ptr, bias3_ptr)
        _finish_halves(sums, top, left, part, row_scale_ptr, scales, biases, residual_ptr, table_ptr, temb_ptr, out_ptr, rows, columns, out_stride, span, temb_stride, bias, gate, residual, tile_rows, tile_columns)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of a program's tile, channels read at a time, warps, and stages of the pipeline.

    So many tiles above each other, a `group`, are worked on together, so that their columns are read from the cache.
    Of `described` ones so many stay on each multiprocessor: with two, one writes out while the other multiplies.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    described: int = 0
    group: int = 8

    def shared_bytes(self, capability: tuple[int, int]) -> int:
        # Hopper's products read both operands from shared memory, others hold one stage in registers.
        buffers = self.stages if capability[0] == 9 else self.stages - 1
        operands = (self.rows + self.columns) * self.depth * buffers
        half_out = self.rows * self.columns  # two bytes a number
        return (operands + half_out if self.described else max(operands, half_out)) + 1024


TILES = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 4, 4),
    Tile(128, 128, 128, 8, 2),
    Tile(128, 128, 128, 8, 3),
    Tile(128, 256, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
    Tile(64, 128, 128, 4, 3),
    Tile(64, 256, 64, 8, 3),
    Tile(128, 256, 128, 8, 3),
    Tile(256, 128, 128, 8, 3),
    Tile(128, 256, 128, 8, 4),
    Tile(128, 256, 128, 8, 3, described=1),
    Tile(256, 128, 128, 8, 3, described=1),
    Tile(128, 256, 128, 8, 4, described=1),
    Tile(256, 128, 128, 8, 4, described=1),
    Tile(128, 128, 128, 4, 3, described=2),
    Tile(128, 128, 128, 4, 3, described=2, group=4),
    Tile(128, 256, 128, 8, 4, described=1, group=16),
)


@cache
def tuner(*, described: bool) -> Tuner[Tile]:
    """With Hopper's kernel among the candidates, or without."""
    return Tuner("product", [tile for tile in TILES if described or not tile.described])


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
    """`reference.int8_product`."""
    columns, channels = weights[0].shape
    count = rows.shape[0]
    out = torch.empty(count, columns * len(weights), dtype=dtype, device=rows.device)
    gate = None if table is None or temb is None else (table[slot], temb[:, slot * columns :])

    def run(tile: Tile) -> torch.Tensor:
        launch(tile, rows, row_scales, weights, scales, biases, out, residual, gate)
        return out

    described = _is_hopper(rows.device) and channels % 16 == 0 and adjacent(weights)
    shape = (bucket(count), columns, channels, len(weights), int(described))
    # What follows the sums is not in the shape, so that all products of one size share a choice.
    return run(tuner(described=described).choose(rows.device, shape, run))


def launch(
    tile: Tile,
    rows: torch.Tensor,
    row_scales: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    out: torch.Tensor,
    residual: torch.Tensor | None,
    gate: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Compute `out` [M, N * parts] with this tile; `gate` is a line [N] and lines [R, N or more] to add to it."""
    count, parts = rows.shape[0], len(weights)
    columns, channels = weights[0].shape
    line, lines = gate or (out, out)
    grid = -(-count // tile.rows) * -(-columns // tile.columns) * parts
    line_count = lines.shape[0]
    numbers = (count, columns, channels, out.stride(0), count // line_count, lines.stride(0))
    rest = (row_scales, *_three(scales), *_three(biases or scales), out if residual is None else residual, line, lines)
    constants = {
        "parts": parts,
        "bias": bool(biases),
        "gate": 0 if gate is None else 1 if line_count == 1 else 2,
        "residual": residual is not None,
        **({} if tile.described else {"even": channels % tile.depth == 0}),
        "group": tile.group,
        "tile_rows": tile.rows,
        "tile_columns": tile.columns,
        "depth": tile.depth,
    }
    kernel, programs = product_kernel, grid
    descriptors: tuple[TensorDescriptor, ...] = ()
    operands: tuple[torch.Tensor, ...] = (rows, *_three(weights))
    if tile.described:
        x = TensorDescriptor(rows, rows.shape, rows.stride(), [tile.rows, tile.depth])
        weight = TensorDescriptor(weights[0], [columns * parts, channels], [channels, 1], [tile.columns, tile.depth])
        kernel, descriptors, operands = described_kernel, (x, weight), ()
        programs = min(grid, tile.described * multiprocessors(rows.device))
    start(
        kernel,
        programs,
        (*operands, *rest, out),
        numbers,
        constants,
        descriptors=descriptors,
        warps=tile.warps,
        stages=tile.stages,
    )


def adjacent(weights: Sequence[torch.Tensor]) -> bool:
    """Whether they lie behind each other in memory, as one matrix."""
    return all(two.data_ptr() - one.data_ptr() == one.nbytes for one, two in pairwise(weights))


def _three(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tensors[0], tensors[min(1, len(tensors) - 1)], tensors[-1]


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
