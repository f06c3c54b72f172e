"""Guidance: ask the transformer in one batch for all that a step needs, and blend the answers.

Formulas: Lightricks/LTX-Video, ltx_video/pipelines/pipeline_ltx_video.py, __call__.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from ltx_batch.model.plan import Guidance
from ltx_batch.model.text import Text

# (tokens [B, N, C], text of B rows) -> velocity [B, N, C]
Predict = Callable[[torch.Tensor, Text], torch.Tensor]
# (blocks, how many rows at the batch's end) -> a context in which those rows are perturbed in those blocks
Perturb = Callable[[tuple[int, ...], int], AbstractContextManager[None]]


def guided_velocity(
    predict: Predict, perturb: Perturb, tokens: torch.Tensor, prompt: Text, negative: Text | None, step: Guidance
) -> torch.Tensor:
    """The velocity at `tokens`, fp32 [B, N, C].

    Rows of a call go block by block: negative prompts, prompts, perturbed prompts. (The official code lays them out so
    too, but perturbs every third row, so its spatio-temporal guidance is right for one clip at a time only.)
    """
    if step.negative and negative is None:
        raise ValueError(f"guidance_scale {step.guidance_scale} needs a negative prompt")
    texts = [negative] if step.negative and negative is not None else []
    texts += [prompt] * (1 + step.perturbed)
    disturbed = perturb(step.skip_blocks, len(tokens)) if step.perturbed else nullcontext()
    with disturbed:
        answers = predict(torch.cat([tokens] * step.rows), Text.stack(texts)).chunk(step.rows)
    plain = answers[1] if step.negative else answers[0]
    velocity = plain
    if step.negative:
        away = cfg_star(answers[0], plain) if step.cfg_star_rescale else answers[0]
        velocity = away + step.guidance_scale * (plain - away)
    if step.perturbed:
        velocity = velocity + step.stg_scale * (plain - answers[-1])
        if step.rescaling_scale != 1:
            velocity = rescale(velocity, plain, step.rescaling_scale)
    return velocity


def cfg_star(negative: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """`negative` [B, N, C] scaled, row by row, to the projection of `positive` on it; arXiv 2503.18886."""
    toward, away = positive.flatten(1), negative.flatten(1)
    factor = (toward * away).sum(1) / (away.square().sum(1) + 1e-8)
    return factor.view(-1, 1, 1) * negative


def rescale(velocity: torch.Tensor, plain: torch.Tensor, share: float) -> torch.Tensor:
    """`velocity` [B, N, C] with each row's deviation brought to that of `plain`, by `share`; arXiv 2305.08891, 3.4."""
    factor = plain.flatten(1).std(1) / velocity.flatten(1).std(1)
    return velocity * (share * factor + (1 - share)).view(-1, 1, 1)
