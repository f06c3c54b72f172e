"""int8 on a GPU: every kernel and every tile against plain torch, fused blocks, compiled blocks, and what waits on the host."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ltx_batch.errors import PrecisionError
from ltx_batch.model.checkpoint import load_checkpoint
from ltx_batch.model.quantize import ops, reference
from ltx_batch.model.quantize.apply import apply_policy
from ltx_batch.model.quantize.block import FusedBlock
from ltx_batch.model.quantize.fp8 import Fp8Linear, check_device
from ltx_batch.model.quantize.linear import Int8Linear
from ltx_batch.model.quantize.policy import precision
from ltx_batch.model.quantize.probe import best_precision_here
from ltx_batch.model.quantize.rope import ONE
from ltx_batch.model.quantize.swap import stored_bytes
from ltx_batch.model.quantize.text_rows import text_kept
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
WIDE = {"num_attention_heads": 8, "attention_head_dim": 64, "cross_attention_dim": 512, "num_layers": 3}
CAPABILITY = torch.cuda.get_device_capability(GPU) if torch.cuda.is_available() else (0, 0)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device=GPU).to(dtype)


def ints(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8, device=GPU)


def near(found: tuple[torch.Tensor, torch.Tensor], right: tuple[torch.Tensor, torch.Tensor]) -> None:
    """At most a step apart, and that seldom: sums in another order tip a number over the edge."""
    apart = (found[0].int() - right[0].int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.02
    torch.testing.assert_close(found[1], right[1], rtol=1e-2, atol=0)
    assert ((found[1] - right[1]).abs() / right[1]).mean() < 1e-3


# kernels


@pytest.mark.parametrize("channels", [256, 2048, 4096, 8192, 16384])
@pytest.mark.parametrize("group", [0, 64, 256])
def test_rows_are_rounded_as_on_the_cpu(channels: int, group: int) -> None:
    x = drawn(333, channels)
    for gelu in (False, True):
        near(ops.quantize_rows(x, group, gelu), reference.quantize_rows(x, group, gelu))
    if channels <= 4096:
        table, temb = 0.2 * drawn(6, channels), 0.2 * drawn(333, 6 * channels)
        for lines in (temb[:1], temb[:3], temb):
            found = ops.quantize_modulated(x, table, lines, 3, 1e-6, group)
            near(found, reference.quantize_modulated(x, table, lines, 3, 1e-6, group))
            plain = reference.modulate_rows(x, table, lines, 3, 1e-6)
            torch.testing.assert_close(ops.modulate_rows(x, table, lines, 3, 1e-6), plain, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("channels", [256, 2048, 4096])
def test_norm_and_rotation_of_query_and_key(channels: int) -> None:
    query, key, _ = drawn(2 * 100, 3 * channels).chunk(3, dim=1)
    weights = drawn(2, channels)
    tables = torch.randint(-ONE, ONE + 1, (2, 100, channels // 2), device=GPU, dtype=torch.int16)
    arguments = (query, key, *weights, *tables, 1e-5)
    for found, right in zip(ops.norm_rotate(*arguments), reference.norm_rotate(*arguments), strict=True):
        torch.testing.assert_close(found, right, rtol=2**-7, atol=2**-7)


def exact(rows: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """In float64, where sums of int8 products are exact."""
    return torch.cat([rows.double() @ weight.double().T for weight in weights], 1)


def room_for_32_bits(tile: Any) -> bool:
    """Tiles are chosen for numbers of 16 bits; on their way out, half a tile of them lies in shared memory."""
    from ltx_batch.model.quantize.kernels.tune import limits

    capability, limit_bytes = limits(GPU)
    return bool(tile.shared_bytes(capability) + tile.rows * tile.columns <= limit_bytes)


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("tokens", [3, 40, 64, 100, 256])
def test_attention_to_the_prompt(width: int, tokens: int) -> None:
    heads, clips, rows = 4, 2, 333
    channels = heads * width
    places = drawn(2, clips, 256, channels)  # of which `tokens` are read
    mask = torch.zeros(clips, 1, tokens, device=GPU, dtype=torch.bfloat16)
    mask[1, :, tokens // 2 + 1 :] = -10000.0
    for given in (None, mask):
        arguments = (
            drawn(clips * rows, channels),
            drawn(channels),
            *(x[:, :tokens] for x in places),
            given,
            heads,
            1e-5,
        )
        exact = (None if x is None else x.float() if isinstance(x, torch.Tensor) else x for x in arguments)
        found, right = ops.attend_text(*arguments), reference.attend_text(*exact)
        assert (found.float() - right).norm() / right.norm() < 4e-3


@pytest.mark.parametrize(("count", "columns", "channels"), [(333, 512, 256), (2688, 4096, 4096), (77, 96, 80)])
def test_every_tile_sums_exactly(count: int, columns: int, channels: int) -> None:
    from ltx_batch.model.quantize.kernels.product import launch, tuner
    from ltx_batch.model.quantize.kernels.tune import limits

    rows = ints(count, channels)
    for parts in (1, 3):
        weights = list(ints(parts * columns, channels).split(columns))
        ones = [torch.ones(columns, device=GPU)] * parts
        for tile in tuner(described=CAPABILITY[0] == 9).fitting(*limits(GPU)):
            if tile.described and (channels % 16 or not room_for_32_bits(tile)):
                continue
            out = torch.empty(count, parts * columns, device=GPU)
            launch(tile, rows, torch.ones(count, device=GPU), weights, ones, [], out, None, None)
            assert torch.equal(out.double(), exact(rows, weights).float().double()), tile


@pytest.mark.parametrize("follows", ["nothing", "residual", "one gate", "gates"])
def test_every_tile_writes_the_same_bits(follows: str) -> None:
    from ltx_batch.model.quantize.kernels.product import launch, tuner
    from ltx_batch.model.quantize.kernels.tune import limits

    count, columns, channels = 640, 512, 1024
    rows, weight, row_scales, scale = ints(count, channels), ints(columns, channels), *map(torch.rand, (count, columns))
    row_scales, scale, bias = row_scales.to(GPU) / 1000, scale.to(GPU), drawn(columns)
    residual = None if follows == "nothing" else drawn(count, columns)
    table = drawn(6, columns) if "gate" in follows else None
    temb = None if table is None else drawn(1 if follows == "one gate" else 64, 6 * columns)
    right = reference.int8_product(
        rows.cpu(), row_scales.cpu(), [weight.cpu()], [scale.cpu()], [bias.cpu()], torch.bfloat16,
        *(None if tensor is None else tensor.cpu() for tensor in (residual, table, temb)), 2,
    )  # fmt: skip
    gate = None if table is None or temb is None else (table[2], temb[:, 2 * columns :])
    for tile in tuner(described=CAPABILITY[0] == 9).fitting(*limits(GPU)):
        out = torch.empty(count, columns, dtype=torch.bfloat16, device=GPU)
        launch(tile, rows, row_scales, [weight], [scale], [bias], out, residual, gate)
        assert torch.equal(out.cpu(), right), tile


@pytest.mark.parametrize("group", [0, 64, 256])
def test_a_layer_is_the_layer_of_the_cpu(group: int) -> None:
    exact = nn.Linear(1024, 512)
    layer = Int8Linear.of(exact, torch.device("cpu"), hadamard_group=group)
    x = torch.randn(3, 50, 1024)
    with torch.inference_mode():
        expected, on_gpu = layer(x), copy.deepcopy(layer).to(GPU)(x.to(GPU)).cpu()
    assert (on_gpu - expected).norm() / expected.norm() < 2e-3


@pytest.mark.skipif(CAPABILITY < (8, 9), reason="the GPU has no e4m3")
@pytest.mark.parametrize("channels", [96, 2048, 4096, 16384])
def test_rows_become_fp8_as_on_the_cpu(channels: int) -> None:
    x = drawn(300, channels)
    x[7] = 0
    for given in (x, drawn(300, 2 * channels)[:, :channels]):
        (rows, scales), (right, right_scales) = ops.fp8_rows(given), reference.fp8_rows(given.cpu())
        assert rows.dtype == torch.float8_e4m3fn and torch.equal(scales.cpu(), right_scales)
        # An RTX 40 rounds by way of fp16, which tips what lies between two numbers.
        apart = (rows.cpu().view(torch.uint8).int() - right.view(torch.uint8).int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


def test_fp8_is_refused_or_near_its_emulation() -> None:
    if CAPABILITY < (8, 9):
        with pytest.raises(PrecisionError, match=r"fp8 takes a GPU of compute capability 8.9 or newer"):
            check_device(GPU)
        return
    layer = Fp8Linear.of(nn.Linear(1024, 512).bfloat16(), torch.device("cpu"))
    x = torch.randn(64, 1024).bfloat16()
    with torch.inference_mode():
        expected, found = layer(x), copy.deepcopy(layer).to(GPU)(x.to(GPU)).cpu()
    assert (found - expected).norm() / expected.norm() < 1e-2


# blocks


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("wide"), transformer=WIDE)


def model(folder: Path, name: str, **bent: Any) -> Any:
    loaded = load_checkpoint(folder, torch.bfloat16, with_text=False)
    apply_policy(loaded.transformer, loaded.vae, precision(name, "cuda", **bent), GPU)
    return loaded.transformer.to(GPU)


@torch.inference_mode()
def call(model: Any, *, tokens: int = 200, levels: int = 1) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    out: torch.Tensor = model(
        hidden_states=torch.randn(2, tokens, 8, generator=draw).to(model.device, model.dtype),
        encoder_hidden_states=torch.randn(2, 256, 16, generator=draw).to(model.device, model.dtype),
        timestep=(1000 * torch.rand(1, levels, generator=draw)).to(model.device).expand(2, -1),
        encoder_attention_mask=(torch.arange(256) < 40).expand(2, -1).to(model.device),
        video_coords=torch.rand(1, 3, tokens, generator=draw).to(model.device),
        return_dict=False,
    )[0]
    return out.float().cpu()


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize("levels", [1, 200])
@pytest.mark.parametrize("group", [0, 64, 256])
def test_fused_blocks_are_near_fp32(wide: Path, group: int, levels: int) -> None:
    exact = load_checkpoint(wide, torch.float32, with_text=False).transformer
    expected = call(exact, levels=levels)
    assert distance(call(model(wide, "int8", hadamard_group=group), levels=levels), expected) < 0.02
    assert distance(call(model(wide, "bf16"), levels=levels), expected) < 0.02


def test_compiled_blocks_compute_the_same(wide: Path) -> None:
    quantised = model(wide, "int8")
    expected = call(quantised)
    quantised.compile_repeated_blocks(fullgraph=True)
    with text_kept(quantised):
        assert distance(call(quantised), expected) < 1e-2
        assert distance(call(quantised), expected) < 1e-2


def test_the_kernels_of_a_first_call_are_compiled_before_it(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a block's side by side, and none as it is launched."""
    import triton

    from ltx_batch.model.quantize.kernels import product, rotary, rows, start, text

    for module in (product, rotary, rows, text):
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()  # what other tests compiled
    monkeypatch.setattr(start, "_known", {})
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **event: compiled.append(event["src"].name))
    calls: list[tuple[bool, int, int]] = []
    compute = FusedBlock._compute

    def watched(*given: Any) -> torch.Tensor:
        before = len(compiled)
        out = compute(*given)
        calls.append((start.building(), before, len(compiled)))
        return out

    monkeypatch.setattr(FusedBlock, "_compute", watched)
    quantised = model(wide, "int8")
    first = call(quantised)
    assert len(set(compiled)) >= 5 and any(built for built, _, _ in calls)
    assert all(before == after for built, before, after in calls if not built)
    calls.clear()
    assert torch.equal(call(quantised), first)
    assert [built for built, _, _ in calls] == [False] * WIDE["num_layers"]


def test_what_works_once_a_clip_waits_in_host_memory(wide: Path) -> None:
    quantised = model(wide, "int8")
    for block in quantised.transformer_blocks:
        for layer in block.parked_layers:
            assert all(parameter.device.type == "cpu" and parameter.is_pinned() for parameter in layer.parameters())
    on_gpu = stored_bytes(quantised, GPU)
    assert on_gpu == stored_bytes(quantised) - stored_bytes(quantised, torch.device("cpu"))
    expected = call(quantised)
    quantised.to("cpu")
    quantised.to(GPU)
    assert stored_bytes(quantised, GPU) == on_gpu
    assert torch.equal(call(quantised), expected)
    with text_kept(quantised):
        kept = call(quantised)
        assert distance(kept, expected) < 1e-2  # of 256 tokens 40 are read: other tiles, and sums in another order
        assert torch.equal(call(quantised), kept)


def test_auto_is_timed() -> None:
    assert best_precision_here(1024).name in ("bf16", "int8", "fp8")
