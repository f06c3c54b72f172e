"""What a trace is given from outside, held to what the pipeline takes: ValueErrors that name argument, found and expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ltx_batch.model.noise import Noise
from ltx_batch.model.plan import TEMPORAL, Plan
from ltx_batch.model.preprocess import ConditionItem
from ltx_batch.model.text import Text

# (pixels [1, 3, F, H, W] in [-1, 1], start frame, strength)
Given = tuple[torch.Tensor, int, float]
_ROUNDING = 1e-3  # by which pixels may leave [-1, 1]


def given_text(name: str, embeds: torch.Tensor | None, mask: torch.Tensor | None, channels: int) -> Text | None:
    """Embeddings [1, tokens, channels] and their mask [1, tokens], or None where neither is given.

    Raises ValueError where one of the two is missing or they do not fit; `channels` are the transformer's.
    """
    if embeds is None and mask is None:
        return None
    if embeds is None or mask is None:
        raise ValueError(f"{name}_embeds and {name}_attention_mask must be given together")
    _check_tensor(f"{name}_embeds", embeds)
    _check_tensor(f"{name}_attention_mask", mask, floats=False)
    if embeds.ndim != 3 or embeds.shape[0] != 1 or mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"{name}_embeds must be [1, tokens, channels] and its mask [1, tokens], "
            f"found {list(embeds.shape)} and {list(mask.shape)}"
        )
    if embeds.shape[2] != channels:
        raise ValueError(f"{name}_embeds must have {channels} channels, as this transformer, found {embeds.shape[2]}")
    return Text(embeds, mask.bool())


def check_alike(prompt: Text, negative: Text | None) -> None:
    """Raises ValueError where both texts cannot go through the transformer together."""
    if negative is not None and negative.embeds.shape != prompt.embeds.shape:
        raise ValueError(
            f"negative_prompt_embeds must be as large as prompt_embeds, {list(prompt.embeds.shape)}, found "
            f"{list(negative.embeds.shape)}; what is not given is made of 256 tokens"
        )


def given_conditions(conditions: Sequence[Given], plan: Plan) -> tuple[ConditionItem, ...]:
    """Raises ValueError for pixels that are not [1, 3, 8k + 1, H, W] in [-1, 1], and what cannot stand in the clip."""
    return tuple(_item(f"conditions[{place}]", given, plan) for place, given in enumerate(conditions))


def _item(name: str, given: Any, plan: Plan) -> ConditionItem:
    if not isinstance(given, tuple | list) or len(given) != 3:
        raise ValueError(f"{name} must be (pixels, start_frame, strength), found {type(given).__name__}")
    pixels, start_frame, strength = given
    _check_pixels(f"{name}: pixels", pixels)
    frames, last = pixels.shape[2], plan.target.num_frames - 1
    if isinstance(start_frame, bool) or not isinstance(start_frame, int) or not 0 <= start_frame <= last:
        raise ValueError(f"{name}: start_frame must be a frame of the clip, 0 to {last}, found {start_frame!r}")
    if frames > 1 and start_frame % TEMPORAL:
        raise ValueError(f"{name}: start_frame of a sequence must be a multiple of {TEMPORAL}, found {start_frame}")
    if start_frame + frames > plan.target.padded_frames:
        raise ValueError(
            f"{name}: {frames} frames from frame {start_frame} on are longer than the clip's {plan.target.padded_frames}"
        )
    if not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise ValueError(f"{name}: strength must be in 0..1, found {strength!r}")
    return ConditionItem(pixels.float(), start_frame, float(strength))


def _check_pixels(name: str, pixels: Any) -> None:
    _check_tensor(name, pixels)
    if pixels.ndim != 5 or pixels.shape[:2] != (1, 3) or pixels.shape[2] % TEMPORAL != 1 or 0 in pixels.shape:
        raise ValueError(f"{name} must be [1, 3, 8k + 1, H, W], found {list(pixels.shape)}")
    low, high = float(pixels.min()), float(pixels.max())
    if not -1 - _ROUNDING <= low <= high <= 1 + _ROUNDING:
        raise ValueError(f"{name} must be in [-1, 1], found {low:g} to {high:g}")


def given_noise(noise: Noise) -> Noise:
    """The same draws, as fp32 on the CPU. Raises ValueError for one that is no tensor of the shape that was asked for."""

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        drawn = noise(name, shape)
        _check_tensor(f"noise({name!r}, {shape})", drawn)
        if tuple(drawn.shape) != shape:
            raise ValueError(f"noise({name!r}, ...) must be of shape {shape}, found {tuple(drawn.shape)}")
        return drawn.to("cpu", torch.float32)

    return draw


def _check_tensor(name: str, value: Any, *, floats: bool = True) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} must be a torch tensor, found {type(value).__module__}.{type(value).__qualname__}")
    if floats and not value.is_floating_point():
        raise ValueError(f"{name} must hold floating-point numbers, found {value.dtype}")
