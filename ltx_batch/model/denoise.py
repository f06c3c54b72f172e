"""The denoise loop, on sigmas: no scheduler stands between a table of timesteps and what is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ltx_batch.model.conditioning import Tokens
from ltx_batch.model.guidance import guided_velocity
from ltx_batch.model.noise import Noise, draw_rows
from ltx_batch.model.perturb import perturbed
from ltx_batch.model.plan import PassPlan
from ltx_batch.model.text import Text

Call = Callable[..., torch.Tensor]  # (transformer, **its inputs) -> velocity
_EPSILON = 1e-6  # sigmas closer than this are the same; LTX-Video, schedulers/rf.py


def denoise_pass(
    transformer: Any,
    tokens: Tokens,
    prompt: Text,
    negative: Text | None,
    plan: PassPlan,
    noises: Sequence[Noise],
    *,
    image_cond_noise_scale: float,
    timestep_scale: float = 1000.0,
    call: Call | None = None,
) -> torch.Tensor:
    """Run the loop of LTX-Video's pipelines/pipeline_ltx_video.py; returns clean tokens fp32 [B, N - extra, C].

    A token given with strength s begins at sigma 1 - s: it waits until the loop is down there, and one of strength 1 is
    never denoised. `negative` may be None where no step's guidance needs it. `call` calls the transformer in place of
    Python.
    """
    latents = tokens.latents
    levels = None if tokens.strengths is None else 1.0 - tokens.strengths
    sigmas = torch.tensor([*plan.sigmas, 0.0], device=latents.device)
    perturb = partial(perturbed, transformer, plan.stg_mode)
    for step, (sigma, guidance) in enumerate(zip(plan.sigmas, plan.guidance, strict=True)):
        latents = _stir(latents, tokens, sigma, step, plan, noises, image_cond_noise_scale)
        at = sigmas[step].view(1, 1) if levels is None else torch.minimum(sigmas[step], levels)

        def predict(rows: torch.Tensor, text: Text, at: torch.Tensor = at) -> torch.Tensor:
            return _velocity(transformer, rows, text, at * timestep_scale, tokens.coords, call or _call)

        velocity = guided_velocity(predict, perturb, latents, prompt, negative, guidance)
        stepped = _step(latents, velocity, at, sigmas, step, plan, noises)
        latents = (
            stepped if levels is None else torch.where((sigma - _EPSILON < levels).unsqueeze(-1), stepped, latents)
        )
    return latents[:, tokens.extra :]


def _step(
    latents: torch.Tensor,
    velocity: torch.Tensor,
    at: torch.Tensor,
    sigmas: torch.Tensor,
    step: int,
    plan: PassPlan,
    noises: Sequence[Noise],
) -> torch.Tensor:
    """Each token from its level to the next of `sigmas`; rf.py, RectifiedFlowScheduler.step.

    Stochastic sampling goes to the clean latents and back up with fresh noise.
    """
    following = _next_sigma(at, sigmas)
    if not plan.stochastic_sampling:
        return latents - (at - following).unsqueeze(-1) * velocity
    clean = latents - at.unsqueeze(-1) * velocity
    noise = draw_rows(noises, f"{plan.name}.stochastic.{step}", tuple(latents.shape[1:]), latents.device)
    return (1 - following.unsqueeze(-1)) * clean + following.unsqueeze(-1) * noise


def _velocity(
    transformer: Any, latents: torch.Tensor, text: Text, timestep: torch.Tensor, coords: torch.Tensor, call: Call
) -> torch.Tensor:
    """One call of the transformer; `timestep` [1, 1] or [1, N] holds for every row. Returns fp32 [B, N, C]."""
    velocity = call(
        transformer,
        hidden_states=latents.to(transformer.dtype),
        encoder_hidden_states=text.embeds.to(transformer.dtype),
        encoder_attention_mask=text.mask,
        timestep=timestep.expand(latents.shape[0], -1),
        video_coords=coords,
        return_dict=False,
    )
    return velocity.float()


def _call(transformer: Any, **inputs: Any) -> torch.Tensor:
    found: torch.Tensor = transformer(**inputs)[0]
    return found


def _next_sigma(at: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """For each entry of `at` [1, N], the highest of `sigmas` [S] below it; rf.py, RectifiedFlowScheduler.step."""
    below = sigmas.view(-1, 1, 1) < at - _EPSILON
    return (below * sigmas.view(-1, 1, 1)).amax(0)


def _stir(
    latents: torch.Tensor,
    tokens: Tokens,
    sigma: float,
    step: int,
    plan: PassPlan,
    noises: Sequence[Noise],
    scale: float,
) -> torch.Tensor:
    """Fresh noise of scale * sigma^2 on tokens of strength 1, which helps motion go on from a still image.

    pipeline_ltx_video.py, add_noise_to_image_conditioning_latents.
    """
    if tokens.strengths is None or scale <= 0:
        return latents
    noise = draw_rows(noises, f"{plan.name}.condition_noise.{step}", tuple(latents.shape[1:]), latents.device)
    stirred = tokens.latents + scale * sigma**2 * noise
    return torch.where((tokens.strengths > 1.0 - _EPSILON).unsqueeze(-1), stirred, latents)
