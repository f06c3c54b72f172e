"""Latents of drawn clips, made once a slice and kept on the device: the transformer trains on these."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor

from . import draw, world
from .buckets import BUCKETS, Bucket
from .nets import normalize

# Chunks of a bucket are all of one size: a convolution of another size is another search for its fastest kernel.
_CHUNK_PIXELS = 16_000_000


@dataclass(frozen=True)
class Latents:
    """Clips of one bucket, bf16: `clip` [N, C, F, H, W] normalised; `still` [N, C, 1, H, W], the frame `still_at` [N] of
    each clip encoded by itself, as a condition is; `low` [N, C, F, H/2, W/2], the clip at half its size, or None."""

    clip: Tensor
    still: Tensor
    still_at: Tensor
    combination: Tensor
    low: Tensor | None = None


Part = tuple[Tensor | None, ...]


@torch.no_grad()
def encode_bucket(
    vae: AutoencoderKLLTXVideo, bucket: Bucket, count: int, generator: torch.Generator, *, halves: bool = False
) -> Latents:
    """`count` clips or a few more: whole chunks."""
    chunks = math.ceil(count / chunk_size(bucket))
    return _joined([encode_chunk(vae, bucket, generator, halves=halves) for _ in range(chunks)])


@torch.no_grad()
def encode_all(
    vae: AutoencoderKLLTXVideo, clips_of_main: int, generator: torch.Generator, seconds: float
) -> list[tuple[Bucket, Latents]]:
    """Every bucket, each with the pixels that its share of the training deserves, or what there was time for."""
    budget = clips_of_main * BUCKETS[0].pixels / BUCKETS[0].share
    wanted = {bucket: math.ceil(budget * bucket.share**0.7 * 0.5 / bucket.pixels) for bucket in BUCKETS}
    parts: dict[Bucket, list[Part]] = {bucket: [] for bucket in BUCKETS}
    began_s = time.monotonic()
    while True:
        done, bucket = min((len(parts[b]) * chunk_size(b) / wanted[b], i) for i, b in enumerate(BUCKETS))
        if done >= 1 or (done > 0 and time.monotonic() - began_s > seconds):
            return [(b, _joined(found)) for b, found in parts.items()]
        parts[BUCKETS[bucket]].append(encode_chunk(vae, BUCKETS[bucket], generator))


def chunk_size(bucket: Bucket) -> int:
    return max(1, _CHUNK_PIXELS // bucket.pixels)


def encode_chunk(
    vae: AutoencoderKLLTXVideo, bucket: Bucket, generator: torch.Generator, *, halves: bool = False
) -> Part:
    scenes = world.sample_scenes(
        chunk_size(bucket), bucket.height, bucket.width, bucket.num_frames, generator=generator
    )
    part = _encode(vae, scenes, generator, halves=halves)
    if generator.device.type == "cuda":
        torch.cuda.synchronize()  # the clock is read between chunks
    return part


def _joined(parts: list[Part]) -> Latents:
    joined = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    return Latents(*joined)  # type: ignore[arg-type]


def _encode(vae: AutoencoderKLLTXVideo, scenes: world.Scenes, generator: torch.Generator, *, halves: bool) -> Part:
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
