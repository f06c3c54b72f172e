"""Fit the transformer and its text encoder together, from nothing, on cached latents.

Conditioning is trained as the official pipeline applies it (LTX-Video, pipelines/pipeline_ltx_video.py): a token given with
strength s is at noise level min(t, 1 - s), a first frame lies in the clip's own tokens, a later frame is extra tokens that
carry its time, and tokens of strength 1 get noise of 0.15 t^2.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import LTXVideoTransformer3DModel
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import T5EncoderModel

from . import world
from .buckets import Bucket
from .cache import Latents, encode_all
from .captions import caption_pool
from .fit_vae import load_vae
from .loop import Losses, Slice, Stepper, Weights, load, rank, save, share, start
from .nets import DISTILLED_SIGMAS, VOCABULARY, make_text_encoder, make_transformer

TOKENS = 12_288  # of latents, in a step of one process
MAX_ROWS = 512
LATENTS_SHARE = 0.1  # of the slice's time, at most, once each size has a few
SAVE_STEPS = 3000
CAPTIONS = 16  # wordings of each combination in a slice
PROMPT_DROPOUT = 0.08
STRANGE_SHARE, STRANGE_RATE = 0.4, 0.25  # of prompts, and of the places between their tokens
CONDITION_NOISE = 0.15
FIRST_FRAME_SHARE, LATER_FRAME_SHARE, SOFT_SHARE = 0.35, 0.25, 0.3  # the last: of conditions with strength below 1


@dataclass(frozen=True)
class Batch:
    """`clean`, `noise` [B, N, C]; `levels` [B, N] sigmas; `hard` bool [B, N], tokens of strength 1; `coords` [B, 3, N]."""

    clean: Tensor
    noise: Tensor
    levels: Tensor
    hard: Tensor
    stir: Tensor
    coords: Tensor
    ids: Tensor


class Denoiser(nn.Module):
    """Text encoder and transformer as one module: they are trained together."""

    def __init__(self, transformer: LTXVideoTransformer3DModel, text_encoder: T5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def forward(self, latents: Tensor, levels: Tensor, coords: Tensor, ids: Tensor) -> Tensor:
        """Velocity [B, N, C]."""
        mask = ids != 0
        embeds = self.text_encoder(input_ids=ids, attention_mask=mask.long())[0]
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep=levels * 1000.0,
            video_coords=coords,
            return_dict=False,
        )[0]


def fit(
    path: Path, vae_path: Path, tokenizer: Tokenizer, seconds: float, *, clips: int, lr: float, lr_end: float
) -> None:
    """Train for `seconds`, the latents' making included, from the weights at `path`, if any, and write them there."""
    began_s = time.monotonic()
    device, generator = start(seed=random.randrange(2**20))
    vae = load_vae(vae_path, device)
    pool = caption_pool(tokenizer, CAPTIONS, seed=random.randrange(2**31)).to(device)
    buckets = encode_all(vae, clips, generator, LATENTS_SHARE * seconds)
    left_s = torch.tensor(seconds - (time.monotonic() - began_s), device=device)
    share(left_s)
    if rank() == 0:
        print("latents:", ", ".join(f"{b.height}x{b.width}x{b.num_frames}: {len(found.clip)}" for b, found in buckets))
        print(f"{float(left_s):.0f} s are left for the steps", flush=True)
    model = Denoiser(make_transformer(), make_text_encoder())
    if load(path, transformer=model.transformer, text_encoder=model.text_encoder):
        print("going on from", path)
    model.to(device)
    weights = Weights(model, betas=(0.9, 0.98), weight_decay=0.01, average=0.999)
    clock, stepper, rng = Slice(float(left_s), lr, lr_end), Stepper(weights, generator), random.Random(clips)
    shares = [bucket.share for bucket, _ in buckets]
    for rate in clock.steps():
        bucket, latents = rng.choices(buckets, shares)[0]
        extra = rng.random() < LATER_FRAME_SHARE
        draw = partial(make_batch, bucket, latents, pool, extra=extra, generator=generator)
        losses = stepper((bucket, extra), lambda draw=draw: step(model, draw()))  # type: ignore[misc]
        weights.update(rate)
        clock.tell(losses)
        if (clock.step + 1) % SAVE_STEPS == 0:  # a slice that is cut off has something to show
            with weights.averaged():
                save(path, transformer=model.transformer, text_encoder=model.text_encoder)
    weights.use_average()
    save(path, transformer=model.transformer, text_encoder=model.text_encoder)
    if rank() == 0:
        print("steps", clock.step)


def step(model: Denoiser, batch: Batch) -> Losses:
    """Squared error of the velocity, over the tokens that are not given."""
    noisy = torch.lerp(batch.clean, batch.noise, batch.levels.unsqueeze(-1)) + batch.stir
    on_gpu = noisy.device.type == "cuda"
    with torch.autocast(noisy.device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
        velocity = model(noisy, batch.levels, batch.coords, batch.ids)
    error = (velocity.float() - (batch.noise - batch.clean)).square().mean(-1)
    free = ~batch.hard
    return {"loss": (error * free).sum() / free.sum()}


def make_batch(bucket: Bucket, latents: Latents, pool: Tensor, *, extra: bool, generator: torch.Generator) -> Batch:
    device = latents.clip.device
    rows = min(MAX_ROWS, max(8, TOKENS // bucket.tokens))
    pick = torch.randint(len(latents.clip), (rows,), generator=generator, device=device)
    clean = latents.clip[pick].float().flatten(2).transpose(1, 2)
    rate = _between(*world.FRAME_RATES_HZ, rows, generator)
    coords = token_coords(bucket.latent_size, torch.zeros(rows, device=device), rate)
    time = _times(rows, generator)
    frame = bucket.latent_size[1] * bucket.latent_size[2]
    strength = torch.zeros(clean.shape[:2], device=device)
    first = torch.rand(rows, generator=generator, device=device) < FIRST_FRAME_SHARE
    strength[:, :frame] = (first * _strengths(rows, generator))[:, None]
    if extra:
        still = latents.still[pick].float().flatten(2).transpose(1, 2)
        clean = torch.cat([still, clean], dim=1)
        still_size = (1, *bucket.latent_size[1:])
        coords = torch.cat([token_coords(still_size, latents.still_at[pick].float(), rate), coords], dim=2)
        strength = torch.cat([_strengths(rows, generator)[:, None].expand(-1, frame), strength], dim=1)
    noise = torch.randn(clean.shape, generator=generator, device=device)
    hard = strength >= 1
    stir = torch.randn(clean.shape, generator=generator, device=device) * CONDITION_NOISE * time.square()[:, None, None]
    ids = _prompts(pool, latents.combination[pick], generator)
    levels = torch.minimum(time[:, None], 1 - strength)
    return Batch(clean, noise, levels, hard, stir * hard.unsqueeze(-1), coords, ids)


def token_coords(size: tuple[int, int, int], start: Tensor, rate: Tensor) -> Tensor:
    """[B, 3, F*H*W] in seconds, rows, columns of pixels; `start` [B] in frames, `rate` [B] in Hz."""
    frames, rows, columns = (torch.arange(n, device=rate.device, dtype=torch.float32) for n in size)
    grid = torch.stack(torch.meshgrid((frames * 8 - 7).clamp(min=0), rows * 32, columns * 32, indexing="ij")).flatten(1)
    coords = grid.unsqueeze(0).repeat(len(rate), 1, 1)
    coords[:, 0] = (coords[:, 0] + start[:, None]) / rate[:, None]
    return coords


def _times(rows: int, generator: torch.Generator) -> Tensor:
    """[rows]: half of them distilled sigmas, the others from a logistic normal that leans towards noise."""
    device = generator.device
    table = world.constant(DISTILLED_SIGMAS, device)
    distilled = table[torch.randint(len(table), (rows,), generator=generator, device=device)]
    smooth = torch.sigmoid(torch.randn(rows, generator=generator, device=device) * 1.2 + 0.5)
    return torch.where(torch.rand(rows, generator=generator, device=device) < 0.5, distilled, smooth)


def _strengths(rows: int, generator: torch.Generator) -> Tensor:
    soft = torch.rand(rows, generator=generator, device=generator.device)
    chance = torch.rand(rows, generator=generator, device=generator.device)
    return torch.where(chance < SOFT_SHARE, soft, torch.ones_like(soft))


def _between(low: float, high: float, rows: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(rows, generator=generator, device=generator.device)


def _prompts(pool: Tensor, combination: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [B, T]: one wording of each row's combination, or for a few the empty prompt."""
    rows, device = len(combination), combination.device
    wording = torch.randint(pool.shape[1], (rows,), generator=generator, device=device)
    ids = pool[combination, wording].long()
    empty = torch.zeros_like(ids)
    empty[:, 0] = 1  # </s>
    dropped = torch.rand(rows, generator=generator, device=device) < PROMPT_DROPOUT
    return torch.where(dropped[:, None], empty, _with_strange_words(ids, generator))


def _with_strange_words(ids: Tensor, generator: torch.Generator) -> Tensor:
    """Some prompts get random tokens between their own, so that wordings never trained do little harm."""
    rows, length = ids.shape
    chance = torch.rand((rows, length), generator=generator, device=ids.device)
    busy = torch.rand((rows, 1), generator=generator, device=ids.device) < STRANGE_SHARE
    strange = torch.randint(3, VOCABULARY, ids.shape, generator=generator, device=ids.device)
    insert = (
        busy & (chance < STRANGE_RATE) & (ids > 0)
    )  # before any token, the closing one too, and never in the padding
    slots = torch.stack([torch.where(insert, strange, 0), ids], dim=2).flatten(1)
    place = torch.where(slots > 0, (slots > 0).cumsum(1) - 1, 2 * length)
    return torch.zeros((rows, 2 * length + 1), dtype=ids.dtype, device=ids.device).scatter(1, place, slots)[:, :length]
