"""Rotation, rounding and the layers made of them: numbers against fp32, on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ltx_batch.model.quantize import reference
from ltx_batch.model.quantize.fp8 import Fp8Linear
from ltx_batch.model.quantize.hadamard import fitting_group, hadamard, rotate
from ltx_batch.model.quantize.linear import Int8Linear
from ltx_batch.model.quantize.weight_only import Int8WeightConv3d, Int8WeightLinear, round_to_scale

CPU = torch.device("cpu")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(inputs: int, outputs: int, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.copy_(drawn(outputs, inputs, seed=seed) / inputs**0.5)
        layer.bias.copy_(drawn(outputs, seed=seed + 1))
    return layer


def error(layer: nn.Module, exact: nn.Linear, x: torch.Tensor) -> float:
    """Relative to what the weights make of it, without the bias."""
    with torch.inference_mode():
        expected = exact(x)
        return float((layer(x) - expected).norm() / (expected - exact.bias).norm())


# rotation


@pytest.mark.parametrize("group", [4, 16, 64, 256])
def test_hadamard_matrices_are_regular_symmetric_and_orthonormal(group: int) -> None:
    matrix = hadamard(group)
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix @ matrix, torch.eye(group))
    assert set(matrix.abs().flatten().tolist()) == {group**-0.5}
    assert set(matrix.sum(0).tolist()) == {1.0}  # so that an offset stays as large as it was, and does not pile up


def test_other_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="128 is no power of four"):
        hadamard(128)


@pytest.mark.parametrize("group", [0, 64, 256])
def test_rotating_both_sides_leaves_the_product(group: int) -> None:
    x, weight = drawn(7, 512), drawn(5, 512, seed=1)
    torch.testing.assert_close(rotate(x, group) @ rotate(weight, group).T, x @ weight.T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("asked", "inputs", "group"),
    [(64, 4096, 64), (256, 4096, 256), (256, 320, 64), (64, 96, 0), (256, 100, 0), (0, 256, 0)],
)
def test_the_largest_group_that_fits(asked: int, inputs: int, group: int) -> None:
    assert fitting_group(asked, inputs) == group


# rounding


def test_rows_are_rounded_by_their_largest_and_half_to_even() -> None:
    x = torch.tensor([[127.0, -127.0, 0.5, 1.5, 2.5, -0.5, 0.49, 0.0], [0.0] * 8, [1e-30, 0, 0, 0, 0, 0, 0, -1e-30]])
    rows, scales = reference.quantize_rows(x, 0)
    assert rows.tolist() == [[127, -127, 0, 2, 2, 0, 0, 0], [0] * 8, [127, 0, 0, 0, 0, 0, 0, -127]]
    assert scales.tolist() == pytest.approx([1.0, 1 / 127, 1e-30 / 127])


def test_a_row_rounds_without_its_neighbours() -> None:
    x = drawn(9, 256)
    rows, scales = reference.quantize_rows(x, 64)
    one, scale = reference.quantize_rows(x[4:5], 64)
    assert torch.equal(rows[4:5], one) and torch.equal(scales[4:5], scale)


def test_what_is_not_finite_stays_so() -> None:
    x = drawn(3, 64)
    x[1] = torch.nan
    x[2, 5] = torch.inf
    layer = Int8Linear.of(linear(64, 8), CPU)
    finite = torch.isfinite(layer(x))
    assert finite[0].all() and not finite[1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_in_16_bits_never_push_a_weight_over_the_edge(dtype: torch.dtype) -> None:
    weights = drawn(2000, 32).to(dtype)
    rounded, scale = round_to_scale(weights)
    assert scale.dtype == torch.bfloat16 and rounded.abs().max() <= 127
    assert ((rounded * scale.float() - weights.float()).abs() <= 0.5001 * scale.float()).all()


# layers


@pytest.mark.parametrize(("inputs", "limit"), [(256, 0.012), (4096, 0.014)])
@pytest.mark.parametrize("group", [0, 64, 256])
def test_int8_is_near_fp32(inputs: int, limit: float, group: int) -> None:
    exact = linear(inputs, 64)
    layer = Int8Linear.of(exact, CPU, hadamard_group=group)
    assert (layer.weight.dtype, layer.weight_scale.shape) == (torch.int8, (64,))
    assert 0.004 < error(layer, exact, drawn(40, inputs, seed=2)) < limit


def with_outliers(x: torch.Tensor) -> torch.Tensor:
    """Some channels far larger than the others, as in a transformer's residual stream."""
    x = x.clone()
    x[:, [5, 700, 2049, 4000]] *= 60
    return x


@pytest.mark.parametrize("group", [64, 256])
@pytest.mark.parametrize("outputs", [256])
def test_rotation_at_least_halves_the_error_that_outliers_make(group: int, outputs: int) -> None:
    exact = linear(4096, outputs)
    x = with_outliers(drawn(64, 4096, seed=3))
    plain = error(Int8Linear.of(exact, CPU), exact, x)
    rotated = error(Int8Linear.of(exact, CPU, hadamard_group=group), exact, x)
    assert plain > 0.03
    assert rotated < plain / 2


@pytest.mark.parametrize(("kind", "limit"), [(Int8WeightLinear, 0.008), (Fp8Linear, 0.045)])
@pytest.mark.parametrize("inputs", [96, 256, 4096])
def test_the_other_layers_are_near_fp32(kind: type[Int8WeightLinear], limit: float, inputs: int) -> None:
    exact = linear(inputs, 64)
    layer = kind.of(exact, CPU)
    assert layer.weight.dtype.itemsize == 1
    x = drawn(2, 20, inputs, seed=4)
    assert layer(x).shape == (2, 20, 64)
    assert 0.001 < error(layer, exact, x) < limit


def test_groups_of_weights_have_scales_of_their_own() -> None:
    exact = linear(256, 16)
    with torch.no_grad():
        exact.weight[:, :128] *= 100  # would drown the other half, were there one scale a row
    small = torch.cat([torch.zeros(4, 128), drawn(4, 128)], 1)
    layer = Int8WeightLinear.of(exact, CPU)
    assert layer.weight_scale.shape == (16, 2)
    assert error(layer, exact, small) < 0.008


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate"])
def test_convolutions_pad_and_stride_as_before(mode: str) -> None:
    exact = nn.Conv3d(6, 8, (3, 3, 1), stride=(2, 1, 1), padding=(1, 1, 0), padding_mode=mode)
    layer = Int8WeightConv3d.of(exact, CPU)
    x = drawn(1, 6, 6, 7, 5)
    with torch.inference_mode():
        expected, found = exact(x), layer(x)
    assert found.shape == expected.shape
    assert 0 < (found - expected).norm() / expected.norm() < 0.01
    assert layer.weight.dtype == torch.int8


@pytest.mark.parametrize("kind", [Int8Linear, Int8WeightLinear, Fp8Linear])
def test_layers_keep_the_models_dtype_and_go_without_a_bias(kind: type[Int8Linear]) -> None:
    exact = nn.Linear(128, 32, bias=False).bfloat16()
    layer = kind.of(exact, CPU)
    out = layer(drawn(3, 128).bfloat16())
    assert (out.dtype, out.shape, layer.bias) == (torch.bfloat16, (3, 32), None)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "weight_scale"]
