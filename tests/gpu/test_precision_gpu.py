"""On a GPU: a folder of bnb-int8 by diffusers' own loader, the probe behind `auto`, and LPIPS."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LTXVideoTransformer3DModel

from ltx_batch.model.lpips import Lpips
from ltx_batch.model.quantize.bnb import is_quantized
from ltx_batch.model.quantize.convert import convert_checkpoint
from ltx_batch.model.quantize.policy import precision
from ltx_batch.model.quantize.probe import probe
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
WIDE = {"num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128, "num_layers": 3}


def test_diffusers_loads_what_quantize_writes_for_bitsandbytes(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", transformer=WIDE)
    convert_checkpoint(source, tmp_path / "made", precision("bnb-int8", "cuda"), {}, GPU)
    model = LTXVideoTransformer3DModel.from_pretrained(tmp_path / "made" / "transformer", torch_dtype=torch.bfloat16)
    assert sum(map(is_quantized, model.modules())) == 3 * 8
    exact = LTXVideoTransformer3DModel.from_pretrained(source / "transformer", torch_dtype=torch.bfloat16).to(GPU)
    draw = torch.Generator(GPU).manual_seed(0)
    hidden, text = (torch.randn(1, *shape, generator=draw, device=GPU).bfloat16() for shape in ((12, 8), (5, 16)))
    with torch.inference_mode():
        found, expected = (
            one(
                hidden,
                text,
                torch.full((1, 1), 700.0, device=GPU),
                torch.ones(1, 5, device=GPU),
                1,
                3,
                4,
                return_dict=False,
            )[0].float()
            for one in (model, exact)
        )
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_every_precision_of_auto_runs_or_says_why_not() -> None:
    times_s, refused = probe(2048, GPU, tokens=1024)
    assert "bf16" in times_s and times_s.keys() | refused.keys() == {"bf16", "int8", "fp8"}
    if torch.cuda.get_device_capability(GPU) >= (8, 9):
        assert not refused


def test_lpips_is_the_cpus() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 255, (2, 3, 64, 64, 3), np.uint8)
    np.testing.assert_allclose(Lpips(device=GPU)(a, b), Lpips()(a, b), rtol=1e-2)
