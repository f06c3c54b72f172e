"""Latents to frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ltx_batch.model.latents import unnormalize
from ltx_batch.model.noise import Noise
from ltx_batch.model.plan import Plan, Target


def decode_row(vae: Any, latents: torch.Tensor, plan: Plan, noise: Noise) -> NDArray[np.uint8]:
    """Normalised latents fp32 [1, C, F, H, W] to cropped frames uint8 [F, H, W, 3].

    One row at a time: decoding is the peak of memory, and a batch gains nothing there.
    """
    video = decode_latents(vae, latents, plan.decode_timestep, plan.decode_noise_scale, noise)
    return to_uint8(crop(video, plan.target))[0]


def crop(video: torch.Tensor, target: Target) -> torch.Tensor:
    """[B, C, F, H, W] of the padded size to what was asked for; ltx_video/inference.py, infer."""
    left, _, top, _ = target.pads
    return video[:, :, : target.num_frames, top : top + target.height, left : left + target.width]


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
    with _seeded_decoder(vae, noise):
        return vae.decode(unnormalize(latents, vae).to(vae.dtype), level, return_dict=False)[0]


@contextmanager
def _seeded_decoder(vae: Any, noise: Noise) -> Iterator[None]:
    """The decoder of release 0.9.1 draws from the global generator inside its layers: seed it by the row.

    On a GPU that generator is the GPU's, so these draws do depend on the kind of device.
    """
    if not any(vae.config.decoder_inject_noise):
        yield
        return
    seed = int(noise("decode.inject", (1,)).view(torch.int32))
    with torch.random.fork_rng([vae.device] if vae.device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def to_uint8(video: torch.Tensor) -> NDArray[np.uint8]:
    """[B, 3, F, H, W] in [-1, 1] to [B, F, H, W, 3] in 0..255, rounded to the nearest."""
    pixels = video.float().mul(127.5).add_(127.5).clamp_(0, 255).round_().to(torch.uint8)  # fp32 video is gigabytes
    return pixels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()
