"""Latents to frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ltx_batch.model.latents import unnormalize
from ltx_batch.model.noise import Noise
from ltx_batch.model.plan import Plan


def decode_row(vae: Any, latents: torch.Tensor, plan: Plan, noise: Noise) -> NDArray[np.uint8]:
    """Normalised latents fp32 [1, C, F, H, W] to cropped frames uint8 [F, H, W, 3].

    One row at a time: decoding is the peak of memory, and a batch gains nothing there.
    """
    video = decode_latents(vae, latents, plan.decode_timestep, plan.decode_noise_scale, noise)
    video = video[:, :, : plan.num_frames, plan.pad_top :, plan.pad_left :][..., : plan.height, : plan.width]
    return to_uint8(video)[0]


def decode_latents(vae: Any, latents: torch.Tensor, timestep: float, noise_scale: float, noise: Noise) -> torch.Tensor:
    """Video [1, 3, F, H, W], about [-1, 1].

    Noise is mixed into the *normalised* latents, as in LTX-Video's pipeline_ltx_video.py (diffusers mixes after
    un-normalising, which differs); only a VAE that was trained with a timestep gets either.
    """
    level = None
    if vae.config.timestep_conditioning:
        drawn = noise("decode", tuple(latents.shape)).to(latents.device)
        latents = latents * (1 - noise_scale) + drawn * noise_scale
        level = torch.tensor([timestep], device=latents.device)
    return vae.decode(unnormalize(latents, vae).to(vae.dtype), level, return_dict=False)[0]


def to_uint8(video: torch.Tensor) -> NDArray[np.uint8]:
    """[B, 3, F, H, W] in [-1, 1] to [B, F, H, W, 3] in 0..255, rounded to the nearest."""
    pixels = (video.float() * 127.5 + 127.5).clamp(0, 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()
