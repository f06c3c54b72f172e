"""Our sigmas against diffusers' schedulers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

from ltx_batch.model.sigmas import SchedulerConfig, linear_quadratic, make_sigmas, uniform


@pytest.mark.parametrize("steps", [2, 3, 8, 30, 41])
def test_linear_quadratic(steps: int) -> None:
    np.testing.assert_allclose(linear_quadratic(steps), linear_quadratic_schedule(steps).numpy(), atol=1e-6)


@pytest.mark.parametrize("tokens", [300, 2400, 13_376])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_shift_by_tokens(tokens: int, terminal: float | None) -> None:
    shape = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=terminal, **shape)
    mu = calculate_shift(tokens, 1024, 4096, 0.95, 2.05)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=mu)  # as LTXPipeline calls it
    ours = make_sigmas(
        "from_checkpoint", 20, tokens, SchedulerConfig(use_dynamic_shifting=True, shift_terminal=terminal, **shape)
    )
    np.testing.assert_allclose(ours, theirs.sigmas[:-1].numpy(), atol=1e-6)


def test_static_shift() -> None:
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=linear_quadratic(12))
    ours = make_sigmas("from_checkpoint", 12, 2400, SchedulerConfig(shift=3.0))
    np.testing.assert_allclose(ours, theirs.sigmas[:-1].numpy(), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 10, 30, 40, 1000])
def test_uniform_is_torchs_linspace_to_the_bit(steps: int) -> None:
    """rf.py takes its levels from there, and a guidance table says 0.9 where the schedule says 0.9."""
    assert uniform(steps) == torch.linspace(1, 1 / steps, steps).tolist()
