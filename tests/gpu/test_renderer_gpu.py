"""The renderer on a CUDA device, on the tiny checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ltx_batch import Condition, RenderRequest, load_renderer
from ltx_batch.clip import Clip
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.gpu

PICTURE = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), dtype=np.uint8)
REQUEST = RenderRequest(
    prompt="a red circle",
    height=60,
    width=96,
    num_frames=25,
    timesteps=(1.0, 0.975, 0.725, 0.4219),
    guidance_scale=3.0,
    conditions=(Condition(PICTURE), Condition(PICTURE, 13, 0.6)),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Clip:
    return load_renderer(str(tiny), device="cpu").render([REQUEST])[0]


def error(clip: Clip, reference: Clip) -> float:
    """Mean difference, as a share of the reference's contrast."""
    return float(np.abs(clip.frames.astype(float) - reference.frames).mean() / reference.frames.std())


@pytest.mark.parametrize(
    ("precision", "limit"), [("fp32", 0.002), ("bf16", 0.1), ("bnb-int8", 0.1), ("int8", 0.1), ("int8-weight", 0.1)]
)
def test_a_gpu_renders_what_the_cpu_renders(tiny: Path, reference: Clip, precision: str, limit: float) -> None:
    renderer = load_renderer(str(tiny), precision=precision, device="cuda")
    clip = renderer.render([REQUEST])[0]
    assert clip.frames.shape == (25, 60, 96, 3)
    assert error(clip, reference) < limit
    assert renderer.device == clip.ran["device"] == torch.cuda.get_device_name()
    assert clip.peak_bytes is not None and clip.peak_bytes > sum(renderer.weights_bytes.values())


def test_auto_is_what_is_fastest_on_a_gpu(tiny: Path) -> None:
    renderer = load_renderer(str(tiny))
    assert renderer.precision in ("bf16", "int8", "fp8")
    assert renderer.render([REQUEST])[0].ran["dtype"] == "bfloat16"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bnb-int8", "int8", "int8-weight"])
def test_the_same_bits_come_again(tiny: Path, precision: str) -> None:
    options: dict[str, Any] = {"precision": precision, "device": "cuda", "attention": "native"}
    first, second = (load_renderer(str(tiny), **options).render([REQUEST])[0] for _ in range(2))
    assert first.frames_sha256() == second.frames_sha256()


def test_a_row_of_a_batch_is_near_the_row_alone(tiny: Path) -> None:
    renderer = load_renderer(str(tiny), precision="fp32", device="cuda")
    requests = [replace(REQUEST, seed=seed, prompt=prompt) for seed, prompt in enumerate(("a", "blue square", "c"))]
    for request, clip in zip(requests, renderer.render(requests), strict=True):
        alone = renderer.render([request])[0]
        assert np.abs(clip.frames.astype(int) - alone.frames).max() <= 1


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_weights_are_a_quarter_of_fp32_and_closing_frees_them(tiny: Path, threshold: float) -> None:
    full = load_renderer(str(tiny), precision="fp32", device="cuda")
    small = load_renderer(str(tiny), precision="bnb-int8", device="cuda", llm_int8_threshold=threshold)
    assert small.weights_bytes["transformer"] < 0.5 * full.weights_bytes["transformer"]
    assert small.render([REQUEST])[0].ran["llm_int8_threshold"] == threshold
    full.close()
    before = torch.cuda.memory_allocated()
    small.close()
    assert torch.cuda.memory_allocated() <= before - sum(small.weights_bytes.values())
