"""Latents to frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ltx_batch.model.conditioning import resize
from ltx_batch.model.latents import unnormalize
from ltx_batch.model.noise import Noise
from ltx_batch.model.plan import Plan, Target


def decode_row(vae: Any, latents: torch.Tensor, plan: Plan, noise: Noise) -> torch.Tensor:
    """Normalised latents fp32 [1, C, F, H, W] to the target's video fp32 [1, 3, F, H, W] in [-1, 1].

    One row at a time: decoding is the peak of memory, and a batch gains nothing there.
    """
    video = decode_latents(vae, latents, plan, noise)
    target = plan.target
    if video.shape[-2:] == (target.padded_height, target.padded_width):
        return crop(video, target).float().clamp_(-1, 1)
    # Frame by frame: the whole video in fp32 at two sizes would be gigabytes more.
    frames = [
        crop(resize(frame.float().clamp_(-1, 1), target.padded_height, target.padded_width), target)
        for frame in video[:, :, : target.num_frames].split(1, dim=2)
    ]
    return torch.cat(frames, dim=2)


def crop(video: torch.Tensor, target: Target) -> torch.Tensor:
    """[B, C, F, H, W] of the padded size to what was asked for; ltx_video/inference.py, infer."""
    left, _, top, _ = target.pads
    return video[:, :, : target.num_frames, top : top + target.height, left : left + target.width]


def decode_latents(vae: Any, latents: torch.Tensor, plan: Plan, noise: Noise) -> torch.Tensor:
    """Video [1, 3, F, H, W], about [-1, 1], in the VAE's dtype.

    Noise is mixed into the *normalised* latents and then their tones are mapped, as in LTX-Video's
    pipeline_ltx_video.py (diffusers mixes after un-normalising, which differs); only a VAE that was trained with a
    timestep gets noise and timestep.
    """
    level = None
    if vae.config.timestep_conditioning:
        drawn = noise("decode", tuple(latents.shape)).to(latents.device)
        latents = latents * (1 - plan.decode_noise_scale) + drawn * plan.decode_noise_scale
        level = torch.tensor([plan.decode_timestep], device=latents.device)
    latents = tone_map(latents, plan.tone_map_compression_ratio)
    with _seeded_decoder(vae, noise):
        video: torch.Tensor = vae.decode(unnormalize(latents, vae).to(vae.dtype), level, return_dict=False)[0]
        return video


def tone_map(latents: torch.Tensor, compression: float) -> torch.Tensor:
    """Large values drawn in, by `compression` in 0..1; pipeline_ltx_video.py, tone_map_latents."""
    if compression == 0:
        return latents
    scale = 0.75 * compression
    return latents * (1 - 0.8 * scale * torch.sigmoid(4 * scale * (latents.abs() - 1)))


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
