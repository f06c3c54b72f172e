"""Fit the latent upsampler: latents of a clip at half its size in, latents of the clip out, both as the VAE gives them."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTXVideo
from torch import nn

from .buckets import Bucket
from .cache import Latents, encode_bucket
from .fit_vae import load_vae
from .loop import Losses, Slice, Stepper, Weights, load, rank, save, start
from .nets import make_upsampler, normalize, unnormalize

PAIRS = (Bucket(128, 128, 17, 0.4), Bucket(320, 320, 17, 0.3), Bucket(192, 320, 17, 0.3))
ROWS = 96


def fit(path: Path, vae_path: Path, seconds: float, *, clips: int, lr: float, lr_end: float) -> None:
    """Train for `seconds` from the weights at `path`, if there are any, and write them there."""
    device, generator = start(seed=random.randrange(2**20))
    vae = load_vae(vae_path, device)
    pairs: list[tuple[Bucket, Latents]] = []
    for bucket in PAIRS:
        count = max(64, round(clips * PAIRS[0].pixels / bucket.pixels))
        pairs.append((bucket, encode_bucket(vae, bucket, count, generator, halves=True)))
    upsampler = make_upsampler()
    if load(path, upsampler=upsampler):
        print("going on from", path)
    upsampler.to(device)
    weights = Weights(upsampler, betas=(0.9, 0.99), average=0.998)
    clock, stepper, rng = Slice(seconds, lr, lr_end), Stepper(weights, generator), random.Random(clips)
    for rate in clock.steps():
        bucket, latents = rng.choices(pairs, [bucket.share for bucket, _ in pairs])[0]
        losses = stepper(bucket, lambda found=latents: step(upsampler, vae, found, generator))  # type: ignore[misc]
        weights.update(rate)
        clock.tell(losses)
    weights.use_average()
    save(path, upsampler=upsampler)
    if rank() == 0:
        print("steps", clock.step, "mean absolute error of normalised latents", float(losses["loss"]))


def step(upsampler: nn.Module, vae: AutoencoderKLLTXVideo, latents: Latents, generator: torch.Generator) -> Losses:
    assert latents.low is not None
    device = latents.clip.device
    pick = torch.randint(len(latents.clip), (ROWS,), generator=generator, device=device)
    low, target = latents.low[pick].float(), latents.clip[pick].float()
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
        raised = upsampler(unnormalize(low, vae))
    return {"loss": (normalize(raised.float(), vae) - target).abs().mean()}
