"""Trace: one clip with everything random, encoded or pre-processed given from outside, and all that comes of it.

This is how a render is compared with another implementation's: give both sides the same embeddings, conditions and draws.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ltx_batch.model.noise import Noise, row_noise
from ltx_batch.model.pipeline import LtxPipeline, Row, Stopwatch
from ltx_batch.model.plan import Plan
from ltx_batch.model.preprocess import ConditionItem
from ltx_batch.model.text import Text
from ltx_batch.request import RenderRequest

# (pixels [1, 3, F, H, W] in [-1, 1], start frame, strength)
Given = tuple[torch.Tensor, int, float]


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
    """What is None is made as `render` makes it."""
    watch = Stopwatch(pipeline.device)
    pipeline.loras.use(request.lora_set, watch)
    if negative is None and plan.needs_negative:
        negative = pipeline.encode(request.negative_prompt, negative=True)
    row = Row(
        prompt=(prompt or pipeline.encode(request.prompt)).to(pipeline.device),
        negative=None if negative is None else negative.to(pipeline.device),
        conditions=tuple(conditions),
        noise=noise or row_noise(request.seed),
        media=media,
    )
    rendered = pipeline.render(plan, [row], watch, finish=_unit_range)
    first, *second = rendered.latents
    return Trace(first, second[0] if second else None, rendered.frames[0])


def _unit_range(video: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([piece / 2 + 0.5 for piece in video], dim=2)


def given_text(name: str, embeds: torch.Tensor | None, mask: torch.Tensor | None) -> Text | None:
    """Embeddings [1, tokens, channels] and their mask [1, tokens], or None where neither is given.

    Raises ValueError where one of the two is missing or they do not fit.
    """
    if embeds is None and mask is None:
        return None
    if embeds is None or mask is None:
        raise ValueError(f"{name}_embeds and {name}_attention_mask must be given together")
    if embeds.ndim != 3 or embeds.shape[0] != 1 or mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"{name}_embeds must be [1, tokens, channels] and its mask [1, tokens], "
            f"found {list(embeds.shape)} and {list(mask.shape)}"
        )
    return Text(embeds, mask.bool())


def given_conditions(conditions: Sequence[Given], plan: Plan) -> tuple[ConditionItem, ...]:
    """Raises ValueError where pixels are not [1, 3, 8k + 1, H, W], or more than fit the clip from their start frame."""
    items = []
    for pixels, start_frame, strength in conditions:
        if pixels.ndim != 5 or pixels.shape[:2] != (1, 3) or pixels.shape[2] % 8 != 1:
            raise ValueError(f"a condition must be [1, 3, 8k + 1, H, W], found {list(pixels.shape)}")
        if start_frame + pixels.shape[2] > plan.target.padded_frames:
            raise ValueError(
                f"a condition of {pixels.shape[2]} frames from frame {start_frame} on is longer than the clip's "
                f"{plan.target.padded_frames}"
            )
        items.append(ConditionItem(pixels.float(), start_frame, strength))
    return tuple(items)
