"""Noise levels (sigmas) of a denoise loop, in plain floats: 1 is all noise, 0 the clean clip. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from ltx_batch.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """The part of a checkpoint's scheduler/scheduler_config.json that shapes the sigmas (names of diffusers).

    An official file says more: which `sampler` (uniform or linear-quadratic; None: as `make_sigmas` tells by the shift),
    and `base_resolution`, latent tokens at which sigmas stay as they are (None: they do not shift so).
    `allowed_inference_steps`, from the metadata of an official file, are the only sigmas that a distilled checkpoint was
    trained for; None where it takes any.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    sampler: str | None = None
    base_resolution: int | None = None
    allowed_inference_steps: tuple[float, ...] | None = None

    @classmethod
    def parse(cls, text: bytes, *, source: str) -> SchedulerConfig:
        """Raises CheckpointError where `text` is no scheduler configuration."""
        try:
            data = json.loads(text)
            return cls(**{field.name: data[field.name] for field in fields(cls) if data.get(field.name) is not None})
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{source} is not a scheduler configuration: {error}") from None


def make_sigmas(sampler: str, num_inference_steps: int, tokens: int, scheduler: SchedulerConfig) -> tuple[float, ...]:
    """Falling sigmas in (0, 1], without the final 0, for a pass of `tokens` latent tokens.

    `uniform` and `linear-quadratic` are taken as they are. `from_checkpoint` follows the scheduler: its sampler where it
    names one; else one that shifts by the number of tokens (releases up to 0.9.1) shifts uniform sigmas, and any other
    (0.9.5 on) linear-quadratic ones.
    """
    if sampler != "from_checkpoint":
        return _made(sampler, num_inference_steps, None, None)
    named = scheduler.sampler or ("uniform" if scheduler.use_dynamic_shifting else "linear-quadratic")
    return _made(named, num_inference_steps, _factor(tokens, scheduler), scheduler.shift_terminal)


@lru_cache(maxsize=1024)
def _made(sampler: str, num_inference_steps: int, factor: float | None, terminal: float | None) -> tuple[float, ...]:
    sigmas = _SAMPLERS[sampler](num_inference_steps)
    if factor is not None:
        sigmas = _shift(sigmas, factor)
    return tuple(_stretch(sigmas, terminal) if terminal else sigmas)


def uniform(num_steps: int) -> list[float]:
    """Equal steps from 1 to 1/num_steps (Lightricks/LTX-Video, schedulers/rf.py, sampler Uniform).

    To the bit what torch.linspace gives in float32: guidance tables are looked up by comparing with these.
    """
    if num_steps == 1:
        return [1.0]
    last = np.float32(1 / num_steps)
    step = float((np.float32(1) - last) / np.float32(num_steps - 1))
    exact = [
        1.0 - step * i if i < num_steps // 2 else float(last) + step * (num_steps - 1 - i) for i in range(num_steps)
    ]
    return [float(np.float32(sigma)) for sigma in exact]


def linear_quadratic(num_steps: int, threshold: float = 0.025) -> list[float]:
    """Half of the steps fall linearly to 1 - threshold, the others quadratically to 0.

    Lightricks/LTX-Video, ltx_video/schedulers/rf.py, linear_quadratic_schedule.
    """
    if num_steps == 1:
        return [1.0]
    linear_steps = num_steps // 2
    quadratic_steps = num_steps - linear_steps
    difference = linear_steps - threshold * num_steps
    quadratic = difference / (linear_steps * quadratic_steps**2)
    linear = threshold / linear_steps - 2 * difference / quadratic_steps**2
    constant = quadratic * linear_steps**2
    falls = [i * threshold / linear_steps for i in range(linear_steps)]
    falls += [quadratic * i**2 + linear * i + constant for i in range(linear_steps, num_steps)]
    return [1.0 - fall for fall in falls]


_SAMPLERS = {"uniform": uniform, "linear-quadratic": linear_quadratic}


def _factor(tokens: int, scheduler: SchedulerConfig) -> float:
    if scheduler.use_dynamic_shifting:
        return math.exp(_dynamic_shift(tokens, scheduler))
    if scheduler.base_resolution is not None:  # rf.py, simple_diffusion_resolution_dependent_timestep_shift
        return tokens / scheduler.base_resolution
    return scheduler.shift


def _shift(sigmas: Sequence[float], factor: float) -> list[float]:
    """s -> f s / (1 + (f - 1) s): arXiv 2403.03206; a factor of 1 changes no bit."""
    return [factor * sigma / (1.0 + (factor - 1.0) * sigma) for sigma in sigmas]


def _dynamic_shift(tokens: int, scheduler: SchedulerConfig) -> float:
    """Line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift); rf.py, get_normal_shift."""
    slope = (scheduler.max_shift - scheduler.base_shift) / (scheduler.max_image_seq_len - scheduler.base_image_seq_len)
    return scheduler.base_shift + slope * (tokens - scheduler.base_image_seq_len)


def _stretch(sigmas: Sequence[float], terminal: float) -> list[float]:
    """Stretched so that the last sigma is `terminal`; rf.py, strech_shifts_to_terminal."""
    if sigmas[-1] >= 1.0:
        return list(sigmas)
    scale = (1.0 - sigmas[-1]) / (1.0 - terminal)
    return [1.0 - (1.0 - sigma) / scale for sigma in sigmas]
