"""Latents: [rows, channels, frames, height, width] for the VAE, [rows, tokens, channels] for the transformer."""

from __future__ import annotations

from typing import Any

import torch

from ltx_batch.model.plan import SPATIAL, TEMPORAL


def to_tokens(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, F, H, W] -> [B, F*H*W, C]."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """[B, F*H*W, C] -> [B, C, F, H, W]; `size` is (F, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, size)


def token_coords(
    size: tuple[int, int, int], *, start_frame: int, frame_rate: float, device: torch.device, causal: bool = True
) -> torch.Tensor:
    """Where each token begins, [1, 3, F*H*W]: seconds, rows, columns.

    The first latent frame holds one frame and each later one eight; releases before 0.9.5, not `causal`, count eight for
    the first too. LTX-Video, autoencoders/vae_encode.py, latent_to_pixel_coords.
    """
    frames, rows, columns = (torch.arange(length, device=device, dtype=torch.float32) for length in size)
    starts = frames * TEMPORAL
    if causal:
        starts = (starts + 1 - TEMPORAL).clamp(min=0)
    starts = starts + start_frame
    grid = torch.meshgrid(starts * (1.0 / frame_rate), rows * SPATIAL, columns * SPATIAL, indexing="ij")
    return torch.stack(grid).flatten(1).unsqueeze(0)


def normalize(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """The VAE's latents, channel by channel, to zero mean and unit variance; vae_encode.py, normalize_latents."""
    return (latents - _channels(vae.latents_mean, latents)) / _channels(vae.latents_std, latents)


def unnormalize(latents: torch.Tensor, vae: Any) -> torch.Tensor:
    return latents * _channels(vae.latents_std, latents) + _channels(vae.latents_mean, latents)


def _channels(statistic: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return statistic.to(latents).view(1, -1, 1, 1, 1)
