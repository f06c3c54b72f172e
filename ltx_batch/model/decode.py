"""Latents to frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ltx_batch.model.conditioning import resize
from ltx_batch.model.latents import unnormalize
from ltx_batch.model.noise import Noise
from ltx_batch.model.plan import Plan, Target
from ltx_batch.model.slices import decode_in_slices, sliced_axis
from ltx_batch.model.slicing import Slices

_PIECE_PIXELS = 2**25  # of frames brought to their size at once: in fp32 a whole video is gigabytes
_PIXEL_BYTES = 48  # of each such pixel: three numbers in fp32, as they come, in their size, and on the way to bytes


def decode_row(
    vae: Any, latents: torch.Tensor, plan: Plan, noise: Noise, slices: Slices | None = None
) -> Iterator[torch.Tensor]:
    """Normalised latents fp32 [1, C, F, H, W] to the target's video, some frames at a time: fp32 [1, 3, f, H, W] in
    [-1, 1], on the latents' device.

    One row at a time: decoding is the peak of memory, and a batch gains nothing there.
    """
    video = decode_video(vae, latents, plan, noise, slices)
    target, last = plan.target, plan.passes[-1]
    pixels = _PIECE_PIXELS if slices is None else min(_PIECE_PIXELS, slices.work_bytes // _PIXEL_BYTES)
    count = max(1, pixels // (last.height * last.width))
    for start in range(0, target.num_frames, count):
        frames = video.frames(start, min(start + count, target.num_frames)).float().clamp_(-1, 1)
        yield crop(resize(frames, target.padded_height, target.padded_width), target)


def crop(video: torch.Tensor, target: Target) -> torch.Tensor:
    """[B, C, F, H, W] of the padded size to what was asked for; ltx_video/inference.py, infer."""
    left, _, top, _ = target.pads
    return video[:, :, : target.num_frames, top : top + target.height, left : left + target.width]


@dataclass(slots=True)
class Video:
    """A decoded video as `parts` side by side along `axis`, 3 or 4, each [F, 3, h, w], on `device` or in host memory."""

    device: torch.device
    axis: int
    parts: list[torch.Tensor] = field(default_factory=list)

    def add(self, part: torch.Tensor, *, to_host: bool) -> None:
        """[1, 3, F, h, w], the next part."""
        part = part[0].movedim(1, 0)
        if to_host and part.device.type == "cuda":
            # torch keeps page-locked memory for the next one. Frame by frame, so that frames come back in one copy.
            host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
            part = host.copy_(part.contiguous(), non_blocking=True)
        self.parts.append(part)

    def frames(self, start: int, stop: int) -> torch.Tensor:
        """[1, 3, stop - start, H, W] on the device."""
        parts = [part[start:stop].to(self.device, non_blocking=True).movedim(0, 1)[None] for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.axis)


def decode_latents(
    vae: Any, latents: torch.Tensor, plan: Plan, noise: Noise, slices: Slices | None = None
) -> torch.Tensor:
    """Video [1, 3, F, H, W], about [-1, 1], in the VAE's dtype."""
    video = decode_video(vae, latents, plan, noise, slices)
    return video.frames(0, len(video.parts[0]))


def decode_video(vae: Any, latents: torch.Tensor, plan: Plan, noise: Noise, slices: Slices | None) -> Video:
    """The same, in parts where `slices` are asked for.

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
    video = Video(latents.device, sliced_axis(latents.shape))
    with _seeded_decoder(vae, noise, latents.device):
        given = unnormalize(latents, vae).to(vae.dtype)
        if slices is None:
            video.add(vae.decode(given, level, return_dict=False)[0], to_host=False)
            return video
        for part in decode_in_slices(vae.decoder, given, level, slices.work_bytes):
            video.add(part, to_host=slices.to_host)
            del part
    return video


def tone_map(latents: torch.Tensor, compression: float) -> torch.Tensor:
    """Large values drawn in, by `compression` in 0..1; pipeline_ltx_video.py, tone_map_latents."""
    if compression == 0:
        return latents
    scale = 0.75 * compression
    return latents * (1 - 0.8 * scale * torch.sigmoid(4 * scale * (latents.abs() - 1)))


@contextmanager
def _seeded_decoder(vae: Any, noise: Noise, device: torch.device) -> Iterator[None]:
    """The decoder of release 0.9.1 draws from the global generator inside its layers: seed it by the row.

    On a GPU that generator is the GPU's, so these draws do depend on the kind of device.
    """
    if not any(vae.config.decoder_inject_noise):
        yield
        return
    seed = int(noise("decode.inject", (1,)).view(torch.int32))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def to_uint8(video: torch.Tensor) -> NDArray[np.uint8]:
    """[B, 3, F, H, W] in [-1, 1] to [B, F, H, W, 3] in 0..255, rounded to the nearest."""
    pixels = video.float().mul(127.5).add_(127.5).clamp_(0, 255).round_().to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()
