"""Triton's kernels without a GPU: interpreted, their numbers; compiled, that every GPU since Ampere takes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "kernel_check.py"
ARCHS = (80, 86, 89, 90, 120)
INT8 = {90: "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"}
OLDER = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"


def run(*arguments: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def interpreted() -> list[dict[str, Any]]:
    return run("interpret")


def test_products_are_the_references_to_the_last_bit(interpreted: list[dict[str, Any]]) -> None:
    cases = [case for case in interpreted if "same" in case]
    assert len(cases) == 40
    assert [case["case"] for case in cases if not case["same"]] == []


def test_rows_are_rounded_as_by_the_reference(interpreted: list[dict[str, Any]]) -> None:
    cases = [case for case in interpreted if "step" in case]
    assert len(cases) == 54
    for case in cases:
        # A number at the edge between two steps may fall to either side.
        assert case["step"] <= 1 and case["differ"] < 2e-3 and case["scale"] <= case["scale_limit"], case


def test_rows_become_fp8_as_by_the_reference(interpreted: list[dict[str, Any]]) -> None:
    cases = [case for case in interpreted if "apart" in case]
    assert len(cases) == 4
    for case in cases:
        assert case["same_scales"] and case["among"] > 400 and case["apart"] < 2e-3, case


def test_norms_modulation_rotation_and_attention_are_the_references(interpreted: list[dict[str, Any]]) -> None:
    cases = [case for case in interpreted if "error" in case]
    assert len(cases) == 28
    for case in cases:
        # Sums of up to 512 numbers in fp32, in the order of whatever CPU this is; in 16 bits nothing of that is seen.
        assert case["error"] < (1.01 if "float16" in case["case"] else 16), case


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return run("compile", *map(str, ARCHS))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_and_every_launch_that_fits_compiles(compiled: list[dict[str, Any]], arch: int) -> None:
    cases = [case for case in compiled if case["case"].startswith(f"sm_{arch} ")]
    products = [case for case in cases if "product_kernel" in case["case"] or "described" in case["case"]]
    assert len(products) >= 12 and len(cases) >= len(products) + 13
    for case in cases:
        assert case["cubin"] > 1000 and case["shared"] <= case["limit"], case
        assert case["counted"] is None or case["shared"] <= case["counted"], case
    for case in products:
        assert case["products"] == [INT8.get(arch, OLDER)], case
        assert case["described"] == ("described_kernel" in case["case"])
    assert any(case["described"] for case in products) == (arch == 90)
    assert sum(case["fp8"] for case in cases) == (2 if arch >= 89 else 0)


def test_nothing_imports_triton_before_a_gpu_is_used() -> None:
    code = (
        "import sys, torch; from ltx_batch.model.quantize import ops, linear; "
        "layer = linear.Int8Linear.of(torch.nn.Linear(64, 8), torch.device('cpu')); layer(torch.ones(2, 64)); "
        "print([name for name in sys.modules if name.startswith('ltx_batch.model.quantize.kernels')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
