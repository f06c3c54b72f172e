"""Fit the autoencoder: clips in, the same clips out, with the decoder told how noisy its latents are."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import AutoencoderKLLTXVideo
from torch import Tensor, nn
from torch.nn import functional

from . import draw, world
from .buckets import BUCKETS, MAIN, Bucket, pick
from .loop import Losses, Slice, Stepper, Weights, load, psnr_db, rank, save, share, start, world_size
from .nets import LATENT_CHANNELS, make_vae

# A pixel of the shape, or this close to its outline, counts as much as this many of the background: what is missing inside
# the outline and what spills over it blur the shape alike.
SHAPE_WEIGHT, OUTLINE_PX = 5.0, 4
# An absolute error alone is least where there is no shape at all, and training rests there: 14 dB on three clips seen 150
# times, against 28 dB with these.
SQUARED_WEIGHT, ABSOLUTE_WEIGHT, EDGE_WEIGHT = 3.0, 0.1, 0.1
MAX_TIMESTEP = 0.1  # decode timesteps trained; the official default is 0.05, with half of that as noise
LOG_VARIANCE = -10.0  # of the posterior: as good as none, the decoder's noise keeps the latents smooth
# A convolutional autoencoder carries over to sizes between these.
FITTED = (
    MAIN,
    Bucket(128, 128, 25, 0.08),
    Bucket(64, 64, 17, 0.08),  # hard: the outline is most of the picture
    Bucket(256, 160, 17, 0.06),
    Bucket(320, 320, 25, 0.05),
)
CLIPS = 40  # of the main bucket in a step, over all processes; other buckets get as many as make the same pixels


class Autoencoder(nn.Module):
    """The autoencoder with a decoder that sees each latent channel at deviation 1.

    Without that the encoder's output grows until the decoder's blocks, whose branches are normalised, hardly count beside
    their input.
    """

    deviation: Tensor

    def __init__(self, vae: AutoencoderKLLTXVideo) -> None:
        super().__init__()
        self.vae = vae
        self.register_buffer("deviation", vae.latents_std.clone())
        with torch.no_grad():
            vae.decoder.conv_in.conv.weight *= _per_input(vae.latents_std)

    def forward(self, clips: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Reconstruction [B, 3, F, H, W] at `timestep` and noise level `noise`, [B] each."""
        latents = self.vae.encode(clips).latent_dist.mean
        with torch.no_grad():
            self.deviation.lerp_(latents.float().transpose(0, 1).flatten(1).std(1), 0.03)
        latents = latents / self.deviation.clamp(min=1e-4).view(1, -1, 1, 1, 1)
        latents = latents + noise.view(-1, 1, 1, 1, 1) * torch.randn_like(latents)
        return self.vae.decoder(latents, timestep)

    @torch.no_grad()
    def fold(self) -> AutoencoderKLLTXVideo:
        """The autoencoder by itself: latents of moderate deviation, each channel its own, and next to no variance."""
        relative = self.deviation / self.deviation.median()
        kept = relative.sqrt().clamp(0.7, 1.4)
        out = self.vae.encoder.conv_out.conv
        factor = kept / self.deviation
        out.weight[:LATENT_CHANNELS] *= factor.view(-1, 1, 1, 1, 1)
        out.bias[:LATENT_CHANNELS] *= factor
        out.weight[LATENT_CHANNELS:] = 0
        out.bias[LATENT_CHANNELS:] = LOG_VARIANCE
        self.vae.decoder.conv_in.conv.weight /= _per_input(kept)
        return self.vae


def _per_input(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1, 1)


def fit(path: Path, seconds: float, *, lr: float, lr_end: float) -> None:
    """Train for `seconds` from the weights at `path`, if there are any, and write them there."""
    device, generator = start(seed=random.randrange(2**20))
    vae = make_vae()
    _quieten(vae)
    if load(path, vae=vae):
        print("going on from", path)
    model = Autoencoder(vae.to(device))
    _first_deviation(model, generator)
    weights = Weights(model, betas=(0.9, 0.99), average=0.998)
    clock, stepper, rng = Slice(seconds, lr, lr_end), Stepper(weights, generator), random.Random(seconds)
    for rate in clock.steps():
        bucket = pick(rng, FITTED)
        losses = stepper(bucket, lambda bucket=bucket: step(model, bucket, generator))  # type: ignore[misc]
        weights.update(rate)
        if clock.step % 50 == 0:
            share(model.deviation)
        clock.tell(losses)
    weights.use_average()
    share(model.deviation)
    model.fold()
    measure_latents(vae, device)
    save(path, vae=vae)
    if rank() == 0:
        print("steps", clock.step)
        report(vae, device)


@torch.no_grad()
def _quieten(vae: AutoencoderKLLTXVideo) -> None:
    """Start with a decoder that ignores its timestep: random modulation by it drowns the latents at first."""
    vae.decoder.timestep_scale_multiplier.requires_grad_(False)
    for name, parameter in vae.decoder.named_parameters():
        if "scale_shift_table" in name or "timestep_embedder.linear_2" in name:
            parameter.zero_()


def step(model: Autoencoder, bucket: Bucket, generator: torch.Generator) -> Losses:
    clips, cover = _draw(bucket, generator)
    timestep = torch.rand(len(clips), device=clips.device, generator=generator) * MAX_TIMESTEP
    noise = timestep * (0.25 + 0.5 * torch.rand(len(clips), device=clips.device, generator=generator))
    with torch.autocast(clips.device.type, torch.bfloat16, enabled=clips.device.type == "cuda", cache_enabled=False):
        decoded = model(clips, timestep, noise).float()
    difference = decoded - clips
    near = functional.max_pool2d(cover.flatten(0, 2), 2 * OUTLINE_PX + 1, stride=1, padding=OUTLINE_PX).view_as(cover)
    weight = 1 + (SHAPE_WEIGHT - 1) * near
    squared, absolute = (weight * difference.square()).mean(), (weight * difference.abs()).mean()
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    loss = SQUARED_WEIGHT * squared + ABSOLUTE_WEIGHT * absolute + EDGE_WEIGHT * edges
    return {"loss": loss, "squared": squared, "psnr": psnr_db(decoded, clips).mean()}


def _draw(bucket: Bucket, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    count = max(1, round(CLIPS * MAIN.pixels / bucket.pixels / world_size()))
    scenes = world.sample_scenes(count, bucket.height, bucket.width, bucket.num_frames, generator=generator)
    return draw.draw(scenes)


@torch.no_grad()
def _first_deviation(model: Autoencoder, generator: torch.Generator) -> None:
    clips, _ = _draw(MAIN, generator)
    model.deviation.copy_(model.vae.encode(clips).latent_dist.mean.transpose(0, 1).flatten(1).std(1))


@torch.no_grad()
def measure_latents(vae: AutoencoderKLLTXVideo, device: torch.device, batches: int = 24) -> None:
    """Set the latents' mean and deviation from fresh clips of all buckets."""
    generator, rng = torch.Generator(device).manual_seed(1), random.Random(1)
    total, square, count = torch.zeros_like(vae.latents_mean), torch.zeros_like(vae.latents_std), 0
    for _ in range(batches):
        clips, _ = _draw(pick(rng, BUCKETS), generator)
        flat = vae.encode(clips).latent_dist.mean.float().transpose(0, 1).flatten(1)
        total, square, count = total + flat.sum(1), square + flat.square().sum(1), count + flat.shape[1]
    vae.latents_mean.copy_(total / count)
    vae.latents_std.copy_((square / count - (total / count).square()).clamp(min=1e-6).sqrt())


def load_vae(path: Path, device: torch.device) -> AutoencoderKLLTXVideo:
    """The trained autoencoder as it ships, rounded to bf16, frozen. Raises FileNotFoundError."""
    vae = make_vae()
    if not load(path, vae=vae):
        raise FileNotFoundError(f"{path}: fit the autoencoder first")
    return vae.to(torch.bfloat16).to(device, torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def reconstruct(vae: AutoencoderKLLTXVideo, clips: Tensor) -> Tensor:
    """Encode and decode without any noise on the latents, at the decode timestep of the official configs."""
    timestep = torch.full((len(clips),), 0.05, device=clips.device)
    return vae.decode(vae.encode(clips).latent_dist.mean, timestep).sample


def report(vae: AutoencoderKLLTXVideo, device: torch.device, count: int = 16) -> None:
    """Print mean PSNR on held-out clips of each bucket, in float32."""
    generator = torch.Generator(device).manual_seed(2)
    for bucket in BUCKETS:
        scenes = world.sample_scenes(
            count, bucket.height, bucket.width, bucket.num_frames, held_out=True, generator=generator
        )
        clips, _ = draw.draw(scenes)
        found = torch.cat([psnr_db(reconstruct(vae, part), part) for part in clips.split(4)])
        print(f"vae {bucket.height}x{bucket.width}x{bucket.num_frames}: {found.mean():.2f} dB, least {found.min():.2f}")
