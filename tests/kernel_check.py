"""Run by the kernel tests in a process of its own, as Triton decides when it is imported whether it interprets.

`interpret` computes every kernel on the CPU and compares it with plain torch; `compile ARCH...` builds every kernel and
every launch that fits for GPUs of that architecture, of which none is needed. Either prints a line of JSON a case.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch

LIMITS_KIB = {
    80: 163,
    86: 99,
    89: 99,
    90: 227,
    120: 99,
}  # shared memory of a program: A100, RTX 30, RTX 40, H100, RTX 50


def interpret() -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    # bf16 is more than the interpreter's numpy knows, so fp16 stands for what has 16 bits.
    for dtype, channels in ((torch.float32, 96), (torch.float32, 320), (torch.float32, 512), (torch.float16, 256)):
        yield from interpret_rows(dtype, channels)
        yield from interpret_rotary(dtype, channels)
    for dtype in (torch.float32, torch.float16):
        yield from interpret_text(dtype)
    yield from interpret_products()


def interpret_rows(dtype: torch.dtype, channels: int) -> Iterator[dict[str, Any]]:
    from ltx_batch.model.quantize import reference
    from ltx_batch.model.quantize.kernels import rows

    x = torch.randn(6, channels).to(dtype)
    x[1] = 0
    table, temb = (0.3 * torch.randn(shape).to(dtype) for shape in ((6, channels), (3, 6 * channels)))
    for lines in (temb, temb[:1]):
        arguments = (x, table, lines, 3, 1e-6)
        found, right = rows.modulate_rows(*arguments), reference.modulate_rows(*arguments)
        yield {"case": f"modulate {dtype} {channels} {len(lines)}", "error": largest(found, right)}
        for group in fitting(channels):
            found8, right8 = rows.quantize_modulated(*arguments, group), reference.quantize_modulated(*arguments, group)
            yield compared(f"modulate, quantise {dtype} {channels} {len(lines)} {group}", dtype, group, found8, right8)
    (found, scales), (right, right_scales) = rows.fp8_rows(x), reference.fp8_rows(x)
    # The interpreter (3.7.1) carries nothing when it rounds, which halves powers of two, and takes ties away from zero.
    between = (right.view(torch.uint8) & 7) > 0
    apart = (found.float() != right.float())[between].float().mean()
    same = torch.equal(scales, right_scales)
    yield {"case": f"fp8 {dtype} {channels}", "same_scales": same, "apart": float(apart), "among": int(between.sum())}
    wide = torch.randn(6, 2 * channels).to(dtype)[:, :channels]  # columns of something wider
    for group in fitting(channels):
        for gelu in (False, True):
            for given in (x, wide):
                found8 = rows.quantize_rows(given, group, gelu)
                right8 = reference.quantize_rows(given, group, gelu)
                yield compared(f"quantise {dtype} {channels} {group} {gelu}", dtype, group, found8, right8)


def interpret_rotary(dtype: torch.dtype, channels: int) -> Iterator[dict[str, Any]]:
    from ltx_batch.model.quantize import reference
    from ltx_batch.model.quantize.kernels import rotary
    from ltx_batch.model.quantize.rope import ONE

    qkv, weights = torch.randn(6, 3 * channels).to(dtype), torch.rand(2, channels).to(dtype)
    for rows in (3, 6):
        tables = torch.randint(-ONE, ONE + 1, (2, rows, channels // 2), dtype=torch.int16)
        arguments = (*qkv.chunk(3, 1)[:2], *weights, *tables, 1e-5)
        pairs = zip(rotary.norm_rotate(*arguments), reference.norm_rotate(*arguments), strict=True)
        error = max(largest(found, right) for found, right in pairs)
        yield {"case": f"rotary {dtype} {channels} {rows}", "error": error}


def interpret_text(dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    from ltx_batch.model.quantize import reference
    from ltx_batch.model.quantize.kernels import text

    for clips, rows, tokens, heads, width in ((1, 70, 40, 2, 16), (2, 33, 17, 3, 32), (2, 5, 200, 1, 64)):
        query, weight = torch.randn(clips * rows, heads * width).to(dtype), torch.rand(heads * width).to(dtype)
        places = torch.randn(2, clips, tokens + 3, heads * width).to(dtype)  # of which less is read
        keys, values = (place[:, :tokens] for place in places)
        mask = torch.where(torch.rand(clips, 1, tokens) < 0.3, -10000.0, 0.0).to(dtype)
        for given in (None, mask):
            arguments = (query, weight, keys, values, given, heads, 1e-5)
            found, right = text.attend_text(*arguments), reference.attend_text(*arguments)
            case = f"text {dtype} {clips} {rows} {tokens} {heads} {width} {given is not None}"
            yield {"case": case, "error": largest(found, right)}


def interpret_products() -> Iterator[dict[str, Any]]:
    from ltx_batch.model.quantize.kernels.product import TILES, Tile

    tiles = (*TILES[:2], Tile(32, 64, 32, 4, 2), Tile(64, 64, 64, 4, 2, described=2))
    for tile in tiles:
        for rows, columns, channels, parts in ((70, 96, 80, 1), (70, 64, 64, 3)):
            for follows in ("nothing", "residual", "one gate", "gates") if parts == 1 else ("nothing",):
                for bias in (True, False):
                    same = product(tile, rows, columns, channels, parts, follows, bias)
                    yield {"case": f"{tile} {rows} {columns} {channels} {parts} {follows} {bias}", "same": same}


def product(tile: Any, rows: int, columns: int, channels: int, parts: int, follows: str, bias: bool) -> bool:
    """Whether it is `reference.int8_product`, to the last bit."""
    from ltx_batch.model.quantize import reference
    from ltx_batch.model.quantize.kernels.product import launch

    def ints(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, dtype=torch.int8)

    x, weights = ints(rows, channels), list(ints(parts * columns, channels).split(columns))
    row_scales, scales = torch.rand(rows), [torch.rand(columns) for _ in weights]
    biases = [torch.randn(columns) for _ in weights] if bias else []
    residual = None if follows == "nothing" else torch.randn(rows, columns)
    table = torch.randn(6, columns) if "gate" in follows else None
    temb = None if table is None else torch.randn(1 if follows == "one gate" else rows // 10, 6 * columns)
    right = reference.int8_product(x, row_scales, weights, scales, biases, torch.float32, residual, table, temb, 2)
    found = torch.empty_like(right)
    gate = None if table is None or temb is None else (table[2], temb[:, 2 * columns :])
    launch(tile, x, row_scales, weights, scales, biases, found, residual, gate)
    return torch.equal(found, right)


def fitting(channels: int) -> list[int]:
    return [group for group in (0, 64, 256) if group == 0 or channels % group == 0]


def largest(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference, in steps of the numbers' own type at the largest of them."""
    step = torch.finfo(right.dtype).eps * float(right.abs().max())
    return float((found.float() - right.float()).abs().max()) / step


def compared(
    case: str, dtype: torch.dtype, group: int, found: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]
) -> dict[str, Any]:
    # Before rows are rotated they are rounded to 16 bits, as for a product in 16 bits, and sums in another order may tip a
    # number there to the next step of its type. Rotation spreads that over the group, each number's part being 1 / sqrt of
    # it: by so much the largest of a row, which makes the scale, may differ. Rows of 32 bits differ by their sums alone.
    limit = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / max(1, group) ** 0.5
    apart = (found[0].int() - right[0].int()).abs()
    return {
        "case": case,
        "step": int(apart.max()),
        "differ": float((apart > 0).float().mean()),
        "scale": float(((found[1] - right[1]).abs() / right[1]).max()),
        "scale_limit": limit,
    }


def build(arch: int) -> Iterator[dict[str, Any]]:
    from ltx_batch.model.quantize.kernels import product, rotary, rows, text

    channels = {"channels": 16, "columns": 16, "x_stride": 16, "temb_stride": 16, "out_stride": 16, "stride": 16}
    flags: dict[str, Any]
    for width in (4096, 16384):
        for group, modulate, shared, quantize in (
            (64, width == 4096, True, True),
            (256, width == 4096, False, True),
            (0, width == 4096, True, width == 16384),
        ):
            flags = {"modulate": modulate, "shared": shared, "gelu": not modulate, "quantize": quantize, "group": group}
            flags["blocks"] = rows.blocks_of(width, group)
            for stages in (2, 3) if group == 64 else (3,):
                launch = rows.RowLaunch(rows.row_bytes(width, lines=modulate and not shared), 2, stages)
                if launch.shared_bytes((arch // 10, arch % 10)) <= LIMITS_KIB[arch] * 1024:
                    yield compiled(rows.row_kernel, flags, arch, rows.WARPS, stages, launch, channels)
        if arch >= 89:  # no GPU before has e4m3
            flags = {"modulate": False, "shared": True, "gelu": False, "quantize": True, "group": 0}
            flags["blocks"] = rows.blocks_of(width, 0)
            launch = rows.RowLaunch(rows.row_bytes(width, lines=False), 2, 3)
            yield compiled(rows.row_kernel, flags, arch, rows.WARPS, 3, launch, channels, {"out_ptr": "*fp8e4nv"})
    yield compiled(rotary.rotary_kernel, {"pairs": 2048}, arch, 16, 3, None, {**channels, "real_pairs": 16})
    for width in (64, 128):
        for tokens in (64, 128, 256):
            tile_rows, tile_tokens, ahead, _ = text.tile_of(tokens)
            flags = {"heads": 32, "width": width, "masked": True, "ahead": ahead}
            flags |= {"tile_rows": tile_rows, "tile_tokens": tile_tokens}
            yield compiled(text.text_kernel, flags, arch, 4, 3, None, {"key_stride": 16, "clip_stride": 16})
    yield compiled(text.rms_kernel, {"block": 4096}, arch, 8, 3, None, channels)
    fitting_tiles = product.tuner(described=arch // 10 == 9).fitting((arch // 10, arch % 10), LIMITS_KIB[arch] * 1024)
    for tile in fitting_tiles:
        kernel = product.described_kernel if tile.described else product.product_kernel
        flags = {
            "bias": True,
            "group": tile.group,
            "tile_rows": tile.rows,
            "tile_columns": tile.columns,
            "depth": tile.depth,
        }
        flags |= {} if tile.described else {"even": True}
        plain = {**flags, "parts": 1, "gate": 0, "residual": False}
        yield compiled(kernel, plain, arch, tile.warps, tile.stages, tile, channels)
        if tile is fitting_tiles[-1]:
            three = {**flags, "parts": 3, "gate": 0, "residual": False}
            yield compiled(kernel, three, arch, tile.warps, tile.stages, tile, channels)
            for gate in (1, 2):
                gated = {**flags, "parts": 1, "gate": gate, "residual": True}
                yield compiled(kernel, gated, arch, tile.warps, tile.stages, tile, channels)


def compiled(
    kernel: Any,
    flags: dict[str, Any],
    arch: int,
    warps: int,
    stages: int,
    launch: Any,
    divisible: dict[str, int],
    other_types: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Build it as a call with aligned bf16 tensors would be. Says what it takes and which products it uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: "constexpr" if name in flags else type_of(name, flags) for name in kernel.arg_names}
    types |= other_types or {}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(types.items())
        if kind.startswith("*") or name in divisible
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=flags, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    found = set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)[.\w]*\.(?:s8|bf16)\.\w+", built.asm["ptx"]))
    capability = (arch // 10, arch % 10)
    return {
        "case": f"sm_{arch} {kernel.__name__} {flags} {warps} {stages}",
        "shared": built.metadata.shared,
        "limit": LIMITS_KIB[arch] * 1024,
        "counted": None if launch is None else launch.shared_bytes(capability),
        "products": sorted(found),
        "fp8": "e4m3x2" in built.asm["ptx"],
        "described": "cp.async.bulk.tensor" in built.asm["ptx"],
        "cubin": len(built.asm["cubin"]),
    }


def type_of(name: str, flags: dict[str, Any]) -> str:
    if name in ("x", "weight"):
        tile = flags["tile_rows" if name == "x" else "tile_columns"]
        return f"tensordesc<i8[{tile}, {flags['depth']}]>"
    if not name.endswith("_ptr"):
        return "fp32" if name == "eps" or (name == "part" and "pairs" in flags) else "i32"
    if name in ("cos_ptr", "sin_ptr"):
        return "*i16"
    if "scale" in name or name == "inverse_ptr":
        return "*fp32"
    is_int8 = "depth" in flags and (re.fullmatch(r"weight\d?_ptr", name) or name == "x_ptr")
    is_int8 = is_int8 or (name == "out_ptr" and flags.get("quantize", False))
    return "*i8" if is_int8 else "*bf16"


def main() -> None:
    verb, *archs = sys.argv[1:]
    if verb == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
        cases = interpret()
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        cases = (case for arch in archs for case in build(int(arch)))
    for case in cases:
        print(json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
