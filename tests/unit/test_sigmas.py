"""Noise levels in plain floats."""

from __future__ import annotations

import pytest

from ltx_batch.errors import CheckpointError
from ltx_batch.model.sigmas import SchedulerConfig, linear_quadratic, make_sigmas, uniform

PLAIN = SchedulerConfig()
# scheduler_config.json of the releases up to 0.9.1.
SHIFTED = SchedulerConfig(
    use_dynamic_shifting=True,
    base_shift=0.95,
    max_shift=2.05,
    base_image_seq_len=1024,
    max_image_seq_len=4096,
    shift_terminal=0.1,
)


@pytest.mark.parametrize("node", [1.0, 0.9967, 0.9933, 0.9850, 0.9767, 0.9008, 0.6180])
def test_linear_quadratic_has_the_nodes_of_the_official_guidance_tables(node: float) -> None:
    # configs/ltxv-13b-0.9.8-dev.yaml names these of its 30 steps as guidance_timesteps.
    assert node in [round(sigma, 4) for sigma in linear_quadratic(30)]


@pytest.mark.parametrize("sampler", ["from_checkpoint", "uniform", "linear-quadratic"])
@pytest.mark.parametrize("scheduler", [PLAIN, SHIFTED, SchedulerConfig(shift=3.0)], ids=["plain", "shifted", "static"])
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_sigmas_fall_from_one_and_stay_above_zero(sampler: str, scheduler: SchedulerConfig, steps: int) -> None:
    sigmas = make_sigmas(sampler, steps, 2400, scheduler)
    assert len(sigmas) == steps
    assert sigmas[0] == 1.0
    assert list(sigmas) == sorted(set(sigmas), reverse=True)
    assert sigmas[-1] > 0


def test_a_checkpoint_that_does_not_shift_is_linear_quadratic() -> None:
    assert make_sigmas("from_checkpoint", 30, 2400, PLAIN) == tuple(linear_quadratic(30))


def test_the_terminal_is_met() -> None:
    assert make_sigmas("from_checkpoint", 20, 2400, SHIFTED)[-1] == pytest.approx(0.1)


def test_more_tokens_shift_more() -> None:
    few, many = (make_sigmas("from_checkpoint", 20, tokens, SHIFTED) for tokens in (1024, 8192))
    assert all(a < b for a, b in zip(few[1:-1], many[1:-1], strict=True))


def test_named_samplers_pass_the_scheduler_by() -> None:
    assert make_sigmas("uniform", 4, 2400, SHIFTED) == tuple(uniform(4)) == (1.0, 0.75, 0.5, 0.25)


def test_scheduler_files_are_read_and_nulls_are_defaults() -> None:
    text = b'{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0, "shift_terminal": null}'
    assert SchedulerConfig.parse(text, source="here") == SchedulerConfig(shift=2.0)
    for broken in (b"{", b"[1]"):
        with pytest.raises(CheckpointError, match="here is not a scheduler configuration"):
            SchedulerConfig.parse(broken, source="here")
