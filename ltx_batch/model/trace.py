"""Trace: one clip with everything random, encoded or pre-processed given from outside, and all that comes of it.

This is how a render is compared with another implementation's: give both sides the same embeddings, conditions and draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ltx_batch.model.given import check_alike, given_noise
from ltx_batch.model.noise import Noise, row_noise
from ltx_batch.model.pipeline import LtxPipeline, Row, Stopwatch
from ltx_batch.model.plan import Plan
from ltx_batch.model.preprocess import ConditionItem
from ltx_batch.model.text import Text
from ltx_batch.request import RenderRequest


@dataclass(frozen=True, slots=True)
class Trace:
    """`first_pass` and `second_pass` are normalised latents, fp32 [1, C, F, H, W], before decode noise and tone map; the
    second is None in a base pipeline. `frames` are fp32 [1, 3, F, H, W] in [0, 1], of the size that was asked for."""

    first_pass: torch.Tensor
    second_pass: torch.Tensor | None
    frames: torch.Tensor


def trace_request(
    pipeline: LtxPipeline,
    plan: Plan,
    request: RenderRequest,
    *,
    prompt: Text | None,
    negative: Text | None,
    conditions: Sequence[ConditionItem],
    media: torch.Tensor | None,
    noise: Noise | None,
) -> Trace:
    """What is None is made as `render` makes it. Raises ValueError where texts or draws do not fit."""
    watch = Stopwatch(pipeline.device)
    pipeline.loras.use(request.lora_set, watch)
    if negative is None and plan.needs_negative:
        negative = pipeline.encode(request.negative_prompt, negative=True)
    prompt = prompt or pipeline.encode(request.prompt)
    check_alike(prompt, negative if plan.needs_negative else None)
    row = Row(
        prompt=prompt.to(pipeline.device),
        negative=None if negative is None else negative.to(pipeline.device),
        conditions=tuple(conditions),
        noise=row_noise(request.seed) if noise is None else given_noise(noise),
        media=media,
    )
    rendered = pipeline.render(plan, [row], watch, finish=_unit_range)
    first, *second = rendered.latents
    return Trace(first, second[0] if second else None, rendered.frames[0])


def _unit_range(video: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([piece / 2 + 0.5 for piece in video], dim=2)
