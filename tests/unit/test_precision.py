"""Precision by name, and what each linear layer becomes by it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from ltx_batch.errors import PrecisionError
from ltx_batch.model.quantize.policy import matches, precision, resolve_name
from ltx_batch.renderer import resolve_precision

BLOCK = (
    *(f"attn{number}.{layer}" for number in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)
OUTSIDE = ("proj_in", "proj_out", "time_embed.linear", "caption_projection.linear_1")


def layers(blocks: int) -> list[str]:
    return [*OUTSIDE, *(f"transformer_blocks.{number}.{name}" for number in range(blocks) for name in BLOCK)]


def kept_blocks(table: dict[str, str], blocks: int) -> list[int]:
    """Those with no quantised layer."""
    quantised = {name.split(".")[1] for name, becomes in table.items() if becomes not in ("bf16", "fp32")}
    return [number for number in range(blocks) if str(number) not in quantised]


@pytest.mark.parametrize(("device", "name"), [("cpu", "fp32"), ("cuda", "bf16"), ("NVIDIA H100 80GB HBM3", "bf16")])
def test_auto_that_cannot_be_timed_follows_the_device(device: str, name: str) -> None:
    assert resolve_precision("auto", device).name == name


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int8-weight", "bnb-int8", "fp8"])
def test_names_stay_what_they_are(name: str) -> None:
    assert resolve_precision(name, "cpu").name == resolve_precision(name, "cuda").name == name


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(PrecisionError, match="unknown precision 'fp23', did you mean fp32"):
        resolve_name("fp23", "cpu")


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("fp32", "cuda", "float32"),
        ("bf16", "cpu", "bfloat16"),
        ("int8", "cpu", "float32"),
        ("int8", "cuda", "bfloat16"),
        ("bnb-int8", "cpu", "float32"),
        ("fp8", "cuda", "bfloat16"),
    ],
)
def test_what_is_not_quantised_follows_name_and_device(name: str, device: str, dtype: str) -> None:
    assert precision(name, device).dtype == dtype


@pytest.mark.parametrize(
    ("pattern", "layer", "covered"),
    [
        ("ff.net.2", "transformer_blocks.0.ff.net.2", True),
        ("transformer_blocks.1", "transformer_blocks.1.attn1.to_q", True),
        ("transformer_blocks.1", "transformer_blocks.10.attn1.to_q", False),
        ("attn2.to_*", "transformer_blocks.3.attn2.to_out.0", True),
        ("attn2.to_*", "transformer_blocks.3.attn1.to_q", False),
        ("net.2", "transformer_blocks.0.ff.net.20", False),
    ],
)
def test_patterns_cover_whole_parts_of_a_name(pattern: str, layer: str, covered: bool) -> None:
    assert matches(layer, pattern) is covered


# what each layer becomes


@pytest.mark.parametrize(
    ("blocks", "kept"), [(48, [0, 1, 46, 47]), (28, [0, 1, 26, 27]), (14, [0, 13]), (13, []), (5, []), (1, [])]
)
@pytest.mark.parametrize("name", ["int8", "int8-weight", "bnb-int8", "fp8"])
def test_the_outermost_blocks_stay(name: str, blocks: int, kept: list[int]) -> None:
    table = precision(name, "cuda").table(layers(blocks))
    assert kept_blocks(table, blocks) == kept
    assert 2 * len(kept) <= 2 * 2 * blocks / 12
    inner = {
        layer: becomes for layer, becomes in table.items() if layer.startswith(f"transformer_blocks.{blocks // 2}.")
    }
    assert Counter(inner.values()) == {name: 8, "bf16": 2}
    assert {layer.split(".", 2)[2] for layer, becomes in inner.items() if becomes == "bf16"} == {
        "attn2.to_k",
        "attn2.to_v",
    }
    assert {table[layer] for layer in OUTSIDE} == {"bf16"}


@pytest.mark.parametrize(("name", "device", "becomes"), [("fp32", "cpu", "fp32"), ("bf16", "cuda", "bf16")])
def test_plain_precisions_quantise_nothing(name: str, device: str, becomes: str) -> None:
    assert set(precision(name, device).table(layers(4)).values()) == {becomes}


@pytest.mark.parametrize(("keep", "kept"), [(0, []), (1, [0, 27]), (4, [0, 1, 2, 3, 24, 25, 26, 27])])
def test_how_many_blocks_stay_can_be_said(keep: int, kept: list[int]) -> None:
    assert kept_blocks(precision("int8", "cuda", keep_blocks=keep).table(layers(28)), 28) == kept


def test_patterns_add_to_what_stays() -> None:
    table = precision("int8", "cpu", skip=("ff.net.2", "transformer_blocks.3.attn1")).table(layers(6))
    stays = [name for name, becomes in table.items() if becomes == "fp32" and name not in OUTSIDE]
    assert len(stays) == 6 * 3 + 4
    assert all("attn2.to_" in name or "ff.net.2" in name or ".3.attn1." in name for name in stays)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": ("transformer_blocks",)}, "int8 would quantise nothing: 40 linear layers in the blocks, all skipped"),
        ({"keep_blocks": 2}, "int8 would quantise nothing"),
        (
            {"skip": ("ff.net.3",)},
            "skip_modules: ff.net.3 matches no linear layer of the blocks; there are e.g. transf",
        ),
        ({"skip": ("proj_out",)}, "skip_modules: proj_out matches no linear layer"),
    ],
)
def test_quantising_nothing_and_patterns_that_match_nothing_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PrecisionError, match=message):
        precision("int8", "cpu", **options).table(layers(4))


def test_a_model_without_blocks_quantises_nothing() -> None:
    with pytest.raises(PrecisionError, match="0 linear layers in the blocks"):
        precision("int8", "cpu").table(OUTSIDE)


def test_other_models_have_other_blocks() -> None:
    names = [f"encoder.block.{number}.layer.0.SelfAttention.q" for number in range(24)]
    table = precision("int8", "cuda").table(["shared", *names], blocks="encoder.block")
    assert [table[name] for name in names] == ["bf16", *["int8"] * 22, "bf16"]


@pytest.mark.parametrize(("asked", "group"), [(None, 64), (0, 0), (256, 256)])
def test_only_int8_rotates(asked: int | None, group: int) -> None:
    assert precision("int8", "cpu", hadamard_group=asked).hadamard_group == group
    assert precision("fp8", "cpu", hadamard_group=asked).hadamard_group == 0


def test_groups_that_are_no_regular_hadamard_order_are_refused() -> None:
    with pytest.raises(PrecisionError, match="hadamard_group 128: it must be one of 0, 64, 256"):
        precision("int8", "cpu", hadamard_group=128)


def test_the_threshold_is_bitsandbytes_alone() -> None:
    assert precision("bnb-int8", "cpu", threshold=6.0).threshold == 6.0
    assert precision("int8", "cpu", threshold=6.0).threshold == 0.0
