"""Precision by name."""

from __future__ import annotations

import pytest

from ltx_batch.errors import PrecisionError
from ltx_batch.model.quantize.policy import matches, precision, resolve_name
from ltx_batch.renderer import resolve_precision


@pytest.mark.parametrize(("device", "name"), [("cpu", "fp32"), ("cuda", "bf16"), ("NVIDIA H100 80GB HBM3", "bf16")])
def test_auto_follows_the_device(device: str, name: str) -> None:
    assert resolve_precision("auto", device) == name


@pytest.mark.parametrize("name", ["fp32", "bf16", "bnb-int8"])
def test_names_stay_what_they_are(name: str) -> None:
    assert resolve_precision(name, "cpu") == resolve_precision(name, "cuda") == name


@pytest.mark.parametrize("name", ["int8", "int8-weight", "fp8"])
def test_planned_names_say_which_work(name: str) -> None:
    with pytest.raises(PrecisionError, match=f"{name} is not built yet; what works: auto, fp32, bf16, bnb-int8"):
        resolve_name(name, "cpu")


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(PrecisionError, match="unknown precision 'fp23', did you mean fp32"):
        resolve_name("fp23", "cpu")


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("fp32", "cuda", "float32"),
        ("bf16", "cpu", "bfloat16"),
        ("bnb-int8", "cpu", "float32"),
        ("bnb-int8", "cuda", "bfloat16"),
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
