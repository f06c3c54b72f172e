"""The sigmas of a file's own scheduler against a plain transcription of Lightricks/LTX-Video, schedulers/rf.py."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ltx_batch.model.parts import open_checkpoint
from ltx_batch.model.sigmas import make_sigmas
from tests.official_file import PLAIN, write_official_file
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def official_timesteps(config: dict[str, Any], steps: int, tokens: int) -> torch.Tensor:
    """RectifiedFlowScheduler.set_timesteps for latents of [1, tokens, channels]; from float32 linspace on in float64, since
    many tokens shift so far that float32 rounds in the fifth digit."""
    sampler, shifting = config.get("sampler", "Uniform"), config.get("shifting")
    levels = torch.linspace(1, 1 / steps, steps).double()
    if sampler == "LinearQuadratic":
        levels = _linear_quadratic(steps)
    if sampler == "Constant":
        levels = _time_shift(config["shift"], levels)
    if shifting == "SD3":
        slope = (2.05 - 0.95) / (4096 - 1024)
        levels = _time_shift(slope * tokens + 0.95 - slope * 1024, levels)
        if config.get("target_shift_terminal") is not None:
            rest = 1 - levels
            levels = 1 - rest / (rest[-1] / (1 - config["target_shift_terminal"]))
    if shifting == "SimpleDiffusion":
        snr = (levels / (1 - levels)) ** 2
        levels = torch.sigmoid(0.5 * (torch.log(snr) + 2 * math.log(tokens / config.get("base_resolution", 32 * 32))))
    return levels


def _time_shift(mu: float, levels: torch.Tensor) -> torch.Tensor:
    return math.exp(mu) / (math.exp(mu) + (1 / levels - 1))


def _linear_quadratic(steps: int, threshold: float = 0.025) -> torch.Tensor:
    half = steps // 2
    rest = steps - half
    difference = half - threshold * steps
    square = difference / (half * rest**2)
    slope = threshold / half - 2 * difference / rest**2
    falls = [i * threshold / half for i in range(half)]
    falls += [square * i**2 + slope * i + square * half**2 for i in range(half, steps)]
    return torch.tensor([1.0 - fall for fall in falls], dtype=torch.float64)


@pytest.mark.parametrize(
    "config",
    [
        {"sampler": "LinearQuadratic", "shifting": None, "base_resolution": None},
        {"sampler": "Uniform"},
        {"shifting": "SD3", "target_shift_terminal": 0.1, "base_resolution": None},
        {"shifting": "SD3"},
        {"shifting": "SD3", "sampler": "LinearQuadratic", "target_shift_terminal": 0.05},
        {"shifting": "SimpleDiffusion"},
        {"shifting": "SimpleDiffusion", "sampler": "LinearQuadratic", "base_resolution": 256},
        {"sampler": "Constant", "shift": 1.5},
    ],
    ids=str,
)
def test_from_checkpoint_follows_the_files_own_scheduler(folder: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    named = {"_class_name": "RectifiedFlowScheduler", "num_train_timesteps": 1000, **config}
    file = write_official_file(folder, tmp_path / "ltx.safetensors", PLAIN, changes={"scheduler": named})
    scheduler = open_checkpoint(file).scheduler
    for steps in (2, 8, 40):
        for tokens in (96, 2400, 22400):
            found = torch.tensor(make_sigmas("from_checkpoint", steps, tokens, scheduler), dtype=torch.float64)
            torch.testing.assert_close(found, official_timesteps(config, steps, tokens), rtol=1e-9, atol=0)
    assert make_sigmas("uniform", 4, 96, scheduler) == (1.0, 0.75, 0.5, 0.25)
