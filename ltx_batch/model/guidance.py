"""Guidance: ask the transformer in one batch for all that a step needs, and blend the answers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ltx_batch.model.plan import Guidance
from ltx_batch.model.text import Text

# (tokens [B, N, C], text of B rows) -> velocity [B, N, C]
Predict = Callable[[torch.Tensor, Text], torch.Tensor]


def guided_velocity(
    predict: Predict, tokens: torch.Tensor, prompt: Text, negative: Text | None, step: Guidance
) -> torch.Tensor:
    """The velocity at `tokens`: v(negative) + scale * (v(prompt) - v(negative)), arXiv 2207.12598.

    Rows go block by block, all negative ones first, as in the official pipeline (pipeline_ltx_video.py).
    """
    if step.rows == 1:
        return predict(tokens, prompt)
    if negative is None:
        raise ValueError(f"guidance_scale {step.guidance_scale} needs a negative prompt")
    away, toward = predict(torch.cat([tokens, tokens]), Text.stack([negative, prompt])).chunk(2)
    return away + step.guidance_scale * (toward - away)
