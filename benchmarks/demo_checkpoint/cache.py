"""Latents of drawn clips, made once a slice and kept on the device: the transformer trains on these."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor

from . import draw, world
from .buckets import BUCKETS, Bucket
from .nets import normalize

_CHUNK_PIXELS = 40_000_000


@dataclass(frozen=True)
class Latents:
    """Clips of one bucket, bf16: `clip` [N, C, F, H, W] normalised; `still` [N, C, 1, H, W], the frame `still_at` [N] of
    each clip encoded by itself, as a condition is; `low` [N, C, F, H/2, W/2], the clip at half its size, or None."""

    clip: Tensor
    still: Tensor
    still_at: Tensor
    combination: Tensor
    low: Tensor | None = None


@torch.no_grad()
def encode_bucket(
    vae: AutoencoderKLLTXVideo, bucket: Bucket, count: int, generator: torch.Generator, *, halves: bool = False
) -> Latents:
    parts = []
    chunk = max(1, _CHUNK_PIXELS // bucket.pixels)
    for start in range(0, count, chunk):
        size = min(chunk, count - start)
        scenes = world.sample_scenes(size, bucket.height, bucket.width, bucket.num_frames, generator=generator)
        parts.append(_encode(vae, scenes, generator, halves=halves))
    joined = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    return Latents(*joined)  # type: ignore[arg-type]


def _encode(
    vae: AutoencoderKLLTXVideo, scenes: world.Scenes, generator: torch.Generator, *, halves: bool
) -> tuple[Tensor | None, ...]:
    clips, _ = draw.draw(scenes)
    at = torch.randint(1, scenes.num_frames, (len(scenes),), generator=generator, device=clips.device)
    stills = clips[torch.arange(len(scenes), device=clips.device), :, at].unsqueeze(2)
    low = None
    if halves:
        low = _latents(vae, draw.draw(scenes.resized(scenes.height // 2, scenes.width // 2))[0])
    return _latents(vae, clips), _latents(vae, stills), at, scenes.combination, low


def _latents(vae: AutoencoderKLLTXVideo, clips: Tensor) -> Tensor:
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=clips.device.type == "cuda"):
        mean = vae.encode(clips).latent_dist.mean
    return normalize(mean.float(), vae).to(torch.bfloat16)


def encode_all(
    vae: AutoencoderKLLTXVideo, clips_of_main: int, generator: torch.Generator
) -> list[tuple[Bucket, Latents]]:
    """Every bucket, each with the pixels that its share of the training deserves."""
    budget = clips_of_main * BUCKETS[0].pixels / BUCKETS[0].share
    found = []
    for bucket in BUCKETS:
        count = max(64, min(2 * clips_of_main, round(budget * bucket.share**0.7 * 0.5 / bucket.pixels)))
        found.append((bucket, encode_bucket(vae, bucket, count, generator)))
    return found
