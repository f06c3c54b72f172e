"""How long a request will take: measured for its shape, else predicted from its work."""

from __future__ import annotations

import math
from typing import Any

from ltx_batch.recent import Recent
from ltx_batch.request import RenderRequest

_SHAPES = 4096  # that are remembered


class CostModel:
    """Predicted render seconds of a request: measured for its shape once there is a measurement, else by work.

    Work of one transformer call is linear in tokens plus attention's square; 20,000 tokens is where the two are about
    equal for the 13B model (benchmarks/results hold the measurements this rests on). Units of work are arbitrary until
    the first observation sets their scale.
    """

    _SMOOTHING = 0.3

    def __init__(self) -> None:
        self._seconds_by_shape: Recent[tuple[Any, ...], float] = Recent(_SHAPES)
        self._seconds_per_work: float | None = None

    @staticmethod
    def work(request: RenderRequest) -> float:
        latent_frames = math.ceil((request.num_frames - 1) / 8) + 1
        tokens = latent_frames * math.ceil(request.height / 32) * math.ceil(request.width / 32)
        calls = len(request.timesteps) if request.timesteps else request.num_inference_steps or 8
        return calls * tokens * (1 + tokens / 20_000)

    @property
    def learned(self) -> bool:
        return self._seconds_per_work is not None

    def predict_s(self, request: RenderRequest) -> float:
        known = self._seconds_by_shape.get(_shape(request))
        return known if known is not None else self.work(request) * (self._seconds_per_work or 1e-3)

    def observe(self, request: RenderRequest, seconds: float) -> None:
        key = _shape(request)
        self._seconds_by_shape[key] = self._blend(self._seconds_by_shape.get(key), seconds)
        self._seconds_per_work = self._blend(self._seconds_per_work, seconds / self.work(request))

    def _blend(self, old: float | None, new: float) -> float:
        return new if old is None else (1 - self._SMOOTHING) * old + self._SMOOTHING * new


def _shape(request: RenderRequest) -> tuple[Any, ...]:
    """What seconds hang on: whether there is guidance, but not how much, and how many steps, but not which."""
    steps = request.num_inference_steps if request.timesteps is None else len(request.timesteps)
    scales = (request.guidance_scale, 1.0), (request.stg_scale, 0.0)  # each with the value at which it is off
    guided = tuple(None if scale is None else scale > off for scale, off in scales)
    sizes = request.height, request.width, request.num_frames
    return *sizes, steps, *guided, len(request.conditions), request.input_media is not None
