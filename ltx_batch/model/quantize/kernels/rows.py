"""Norm and modulation, GELU and rotation on the way into int8, or rounding alone into e4m3: a row is read once and written once.

Its scale is known when all of it is, so a row stays in registers, up to 16384 numbers over four warps. A program takes
row after row, and keeps what they share. Rotation goes through the tensor cores, 64 channels at a time; of a group of 256
there are four such runs, and the 4 x 4 matrix over them is sums in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ltx_batch.model.quantize.kernels.start import start
from ltx_batch.model.quantize.kernels.tune import Tuner, bucket, multiprocessors

_LANES = tl.constexpr(64)
# Never tuned: the order of sums hangs on it. On an H100 eight take a fifth longer over rows of 16384.
WARPS = 4
_RINT = tl.constexpr(12582912.0)  # 1.5 * 2^23: fp32 has no fractions there, so adding it rounds half to even


@triton.jit
def _line(ptr: tl.tensor, other_ptr: tl.tensor, cols: tl.tensor, channels: tl.tensor) -> tl.tensor:
    line = tl.load(ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)
    return line + tl.load(other_ptr + cols, mask=cols < channels, other=0.0).to(tl.float32)


@triton.jit
def _gelu(x: tl.tensor) -> tl.tensor:
    """The tanh form, by a sigmoid."""
    # exp(-2 * sqrt(2 / pi) * (x + 0.044715 * x^3)), with the constants and the base drawn together
    power = tl.exp2(x * (-2.302208198 - 0.1029432397 * (x * x)))
    half = tl.rsqrt(1.0 + power)  # of the sigmoid; a division takes several times as long
    return x * half * half


@triton.jit
def _signs(dtype: tl.constexpr) -> tl.tensor:
    """The regular Hadamard matrix of order 64, unscaled: -1 for each base-4 digit in which row and column add up to 3."""
    i = tl.arange(0, _LANES)
    differ = i[:, None] ^ i[None, :]
    threes = differ & (differ >> 1) & 21
    odd = (threes ^ (threes >> 2) ^ (threes >> 4)) & 1
    return (1 - 2 * odd).to(dtype)


@triton.jit
def row_kernel(
    x_ptr: tl.tensor,
    table_ptr: tl.tensor,
    temb_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    x_stride: tl.tensor,
    span: tl.tensor,
    temb_stride: tl.tensor,
    eps: tl.tensor,
    modulate: tl.constexpr,
    shared: tl.constexpr,
    gelu: tl.constexpr,
    quantize: tl.constexpr,
    group: tl.constexpr,
    blocks: tl.constexpr,
) -> None:
    """Rows as tiles [blocks, 64], four of them for a group of 256. `shared`: one line of `temb` holds for all rows."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tiles: tl.constexpr = 4 if group == 256 else 1
    kind: tl.constexpr = out_ptr.dtype.element_ty
    most: tl.constexpr = 127.0 if kind == tl.int8 else 448.0  # the largest number of int8, and of e4m3
    first = tl.arange(0, blocks)[:, None] * (tiles * _LANES) + tl.arange(0, _LANES)[None, :]
    signs = _signs(dtype)
    shifts: tl.tuple = ()
    scales: tl.tuple = ()
    if modulate and shared:
        for tile in tl.static_range(tiles):
            cols = first + tile * _LANES
            shifts += (_line(table_ptr, temb_ptr, cols, channels),)
            scales += (1.0 + _line(table_ptr + channels, temb_ptr + channels, cols, channels),)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        xs: tl.tuple = ()
        squares = tl.zeros((blocks, _LANES), dtype=tl.float32)
        for tile in tl.static_range(tiles):
            cols = first + tile * _LANES
            x = tl.load(x_ptr + row * x_stride + cols, mask=cols < channels, other=0.0).to(tl.float32)
            if gelu:
                x = _gelu(x)
            if modulate:
                squares += x * x
            xs += (x,)
        if modulate:
            inverse_rms = tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / channels + eps)
        turned: tl.tuple = ()
        total = tl.zeros((blocks, _LANES), dtype=tl.float32)
        for tile in tl.static_range(tiles):
            cols = first + tile * _LANES
            x = xs[tile]
            if modulate:
                if shared:
                    shift, scale = shifts[tile], scales[tile]
                else:
                    line_ptr = temb_ptr + row // span * temb_stride
                    shift = _line(table_ptr, line_ptr, cols, channels)
                    scale = 1.0 + _line(table_ptr + channels, line_ptr + channels, cols, channels)
                x = x * inverse_rms * scale + shift
            x = x.to(dtype)  # what a product in 16 bits would be given
            if not quantize:
                tl.store(out_ptr + row * channels + cols, x, mask=cols < channels)
            if group > 0:
                x = tl.dot(x, signs, out_dtype=tl.float32, input_precision="ieee") * (0.125 if tiles == 1 else 0.0625)
            turned += (x.to(tl.float32),)
            total += x.to(tl.float32)
        if quantize:
            mixed: tl.tuple = ()
            size = tl.zeros((blocks, _LANES), dtype=tl.float32)
            for tile in tl.static_range(tiles):
                x = turned[tile] if tiles == 1 else total - 2.0 * turned[3 - tile]
                size = tl.maximum(size, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
                mixed += (x,)
            largest = tl.max(tl.max(size, axis=1), axis=0)
            largest = tl.where(largest == 0.0, 1.0, largest)
            tl.store(scale_ptr + row, tl.div_rn(largest, most))
            inverse = tl.div_rn(most, largest)
            for tile in tl.static_range(tiles):
                cols = first + tile * _LANES
                rounded = mixed[tile] * inverse
                if kind == tl.int8:
                    rounded = (rounded + _RINT).to(tl.int32, bitcast=True)
                tl.store(out_ptr + row * channels + cols, rounded.to(kind), mask=cols < channels)


@dataclass(frozen=True, slots=True)
class RowLaunch:
    """`programs` on each multiprocessor, 0 for as many as there are rows. Where rows are rotated they are read ahead, so
    that `stages` are under way; `row_bytes` is all that is read for one."""

    row_bytes: int
    programs: int
    stages: int

    def shared_bytes(self, capability: tuple[int, int]) -> int:
        rotating = 2 * _LANES.value**2 + min(2 * self.row_bytes, 16384)  # the matrix, and a tile on its way through it
        return (self.stages - 1) * self.row_bytes + rotating + 1024


@cache
def tuner(row_bytes: int) -> Tuner[RowLaunch]:
    tries = ((0, 2), (2, 2), (2, 3), (3, 4), (4, 2), (4, 3), (8, 2), (8, 3))
    return Tuner("rows", [RowLaunch(row_bytes, programs, stages) for programs, stages in tries])


def quantize_rows(x: torch.Tensor, group: int, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.quantize_rows`."""
    return _quantize(x, None, x, 0.0, group, gelu=gelu)


def fp8_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.fp8_rows`."""
    return _quantize(x, None, x, 0.0, 0, gelu=False, dtype=torch.float8_e4m3fn)


def quantize_modulated(
    x: torch.Tensor, table: torch.Tensor, temb: torch.Tensor, slot: int, eps: float, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.quantize_modulated`."""
    return _quantize(x, table[slot:], temb[:, slot * x.shape[1] :], eps, group, gelu=False)


def modulate_rows(x: torch.Tensor, table: torch.Tensor, temb: torch.Tensor, slot: int, eps: float) -> torch.Tensor:
    """`reference.modulate_rows`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, table[slot:], temb[:, slot * x.shape[1] :], out, out, eps, group=0, gelu=False, quantize=False)
    return out


def _quantize(
    x: torch.Tensor,
    table: torch.Tensor | None,
    temb: torch.Tensor,
    eps: float,
    group: int,
    *,
    gelu: bool,
    dtype: torch.dtype = torch.int8,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _launch(x, table, temb, out, scales, eps, group=group, gelu=gelu, quantize=True)
    return out, scales


def _launch(
    x: torch.Tensor,
    table: torch.Tensor | None,
    temb: torch.Tensor,
    out: torch.Tensor,
    scales: torch.Tensor,
    eps: float,
    *,
    group: int,
    gelu: bool,
    quantize: bool,
) -> None:
    rows, channels = x.shape
    lines = temb.shape[0]
    assert x.stride(1) == 1 and temb.stride(1) == 1
    tensors = (x, x if table is None else table, temb, out, scales)
    numbers = (rows, channels, x.stride(0), rows // lines, temb.stride(0), eps)
    constants = {
        "modulate": table is not None,
        "shared": lines == 1,
        "gelu": gelu,
        "quantize": quantize,
        "group": group,
        "blocks": blocks_of(channels, group),
    }

    def run(launch: RowLaunch) -> torch.Tensor:
        programs = min(rows, launch.programs * multiprocessors(x.device)) if launch.programs else rows
        start(row_kernel, programs, tensors, numbers, constants, warps=WARPS, stages=launch.stages)
        return out

    becomes = (2 if out.is_floating_point() else 1) if quantize else 0
    variant = (bucket(rows), channels, group, int(table is not None), int(lines == 1), int(gelu), becomes)
    choices = tuner(row_bytes(channels, lines=table is not None and lines > 1))
    run(choices.choose(x.device, variant, run))


def row_bytes(channels: int, *, lines: bool) -> int:
    """Of a row in 16 bits; with `lines`, of those that modulate it too, which are its own."""
    return 2 * channels * (5 if lines else 1)


@cache
def blocks_of(channels: int, group: int) -> int:
    """Runs of 64 channels in a tile, as a power of two; a tensor core takes at least 16."""
    blocks = triton.next_power_of_2(triton.cdiv(channels, 256 if group == 256 else 64))
    return max(16, blocks) if group else blocks
