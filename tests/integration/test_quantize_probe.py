"""What `auto` is decided by: one block timed in each precision, and what becomes of one that does not work on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx_batch.job import JobSpec
from ltx_batch.model.quantize import probe
from ltx_batch.model.quantize.choose import choose
from ltx_batch.model.quantize.fp8 import Fp8Linear
from ltx_batch.model.quantize.policy import Resolved
from ltx_batch.recipe import job_precision
from ltx_batch.renderer import resolve_precision
from tests.tiny_checkpoint import write_tiny_checkpoint

CPU = torch.device("cpu")


def test_each_precision_is_timed() -> None:
    times_s, refused = probe.probe(512, CPU, tokens=32)
    assert list(times_s) == ["bf16", "int8", "fp8"] and not refused
    assert min(times_s.values()) > 0


def test_a_kernel_that_does_not_run_here_is_refused_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(layer: Fp8Linear, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(Fp8Linear, "forward", forward)
    times_s, refused = probe.probe(512, CPU, tokens=32)
    assert list(times_s) == ["bf16", "int8"]
    assert refused == {"fp8": "no kernel image is available"}


@pytest.mark.parametrize("factor", [0.5, float("nan")])
def test_a_kernel_that_computes_something_else_is_refused_however_fast(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    right = Fp8Linear.forward
    monkeypatch.setattr(Fp8Linear, "forward", lambda layer, x: factor * right(layer, x))
    times_s, refused = probe.probe(512, CPU, tokens=32)
    assert "fp8" not in times_s and "its numbers are off by" in refused["fp8"]


def test_nothing_is_chosen_unseen_where_bf16_cannot_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.nn.Linear, "forward", linear)
    times_s, refused = probe.probe(512, CPU, tokens=32)
    assert choose(times_s, refused=refused) == ("bf16", "it could not be timed (CUDA out of memory)")


def test_auto_on_a_gpu_is_timed_at_the_width_of_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int | None]] = []

    def best_precision_here(channels: int, tokens: int | None) -> Resolved:
        asked.append((channels, tokens))
        return Resolved("fp8", "timed")

    monkeypatch.setattr(probe, "best_precision_here", best_precision_here)
    tiny = str(write_tiny_checkpoint(tmp_path))
    assert resolve_precision("auto", "cuda", checkpoint=tiny) == ("fp8", "timed")
    assert resolve_precision("auto", "cpu", checkpoint=tiny).name == "fp32"
    job = JobSpec.model_validate(
        {
            "manifest": "m.parquet",
            "output": "out",
            "model": {"checkpoint": tiny, "device": "cuda"},
            "defaults": {"height": 512, "width": 750, "num_frames": 48},
        }
    )
    assert job_precision(job).name == "fp8"
    assert asked == [(32, None), (32, 7 * 16 * 24)]  # 49 frames of 512x768
