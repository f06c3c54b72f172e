"""Latents to frames."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ltx_batch.model.conditioning import resize
from ltx_batch.model.latents import unnormalize
from ltx_batch.model.noise import Noise
from ltx_batch.model.plan import SPATIAL, Plan, Target
from ltx_batch.model.tiles import Tiles

_PIECE_PIXELS = 2**25  # of frames brought to their size at once: in fp32 a whole video is gigabytes


def decode_row(
    vae: Any, latents: torch.Tensor, plan: Plan, noise: Noise, tiles: Tiles | None = None
) -> Iterator[torch.Tensor]:
    """Normalised latents fp32 [1, C, F, H, W] to the target's video, some frames at a time: fp32 [1, 3, f, H, W] in
    [-1, 1], on the latents' device.

    One row at a time: decoding is the peak of memory, and a batch gains nothing there.
    """
    video = decode_latents(vae, latents, plan, noise, tiles)
    target = plan.target
    count = max(1, _PIECE_PIXELS // (video.shape[3] * video.shape[4]))
    for piece in video[:, :, : target.num_frames].split(count, dim=2):
        frames = piece.to(latents.device).float().clamp_(-1, 1)
        yield crop(resize(frames, target.padded_height, target.padded_width), target)


def crop(video: torch.Tensor, target: Target) -> torch.Tensor:
    """[B, C, F, H, W] of the padded size to what was asked for; ltx_video/inference.py, infer."""
    left, _, top, _ = target.pads
    return video[:, :, : target.num_frames, top : top + target.height, left : left + target.width]


def decode_latents(
    vae: Any, latents: torch.Tensor, plan: Plan, noise: Noise, tiles: Tiles | None = None
) -> torch.Tensor:
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

    def decode(part: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = vae.decode(part, level, return_dict=False)[0]
        return found

    with _seeded_decoder(vae, noise, latents.device):
        given = unnormalize(latents, vae).to(vae.dtype)
        return decode(given) if tiles is None else decode_in_tiles(decode, given, tiles)


def decode_in_tiles(
    decode: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor, tiles: Tiles
) -> torch.Tensor:
    """[1, C, F, H, W] to [1, 3, 8F - 7, 32H, 32W], tile by tile, seams blended on the device as `tiled_decode` of
    diffusers' AutoencoderKLLTXVideo blends them, which holds all tiles there and joins them by copies."""
    height, width = (side * SPATIAL for side in latents.shape[3:])
    tops, lefts = tiles.grid(height, width)
    video: torch.Tensor | None = None
    above: list[torch.Tensor] = []
    for top in tops:
        edges: list[torch.Tensor] = []
        beside: torch.Tensor | None = None
        for left in lefts:
            rows = slice(top // SPATIAL, (top + tiles.height) // SPATIAL)
            tile = decode(latents[..., rows, left // SPATIAL : (left + tiles.width) // SPATIAL])
            if above:
                _blend(above[len(edges)], tile, dim=3)
            if beside is not None:
                _blend(beside, tile, dim=4)
            beside = tile[..., -tiles.overlap :].clone()
            edges.append(tile[..., -tiles.overlap :, :].clone())
            if video is None:
                place = torch.device("cpu") if tiles.to_host else tile.device
                video = torch.empty((*tile.shape[:3], height, width), dtype=tile.dtype, device=place)
            # The next tiles' pixels go over this one's edges.
            video[..., top : top + tile.shape[3], left : left + tile.shape[4]] = tile
        above = edges
    assert video is not None
    return video


def _blend(before: torch.Tensor, tile: torch.Tensor, dim: int) -> None:
    """Fade from `before`, the edge of the tile before, into the first pixels of `tile` along `dim`."""
    count = before.shape[dim]
    share = torch.arange(count, device=tile.device).div(count).to(tile.dtype)
    share = share.view([-1 if axis == dim else 1 for axis in range(tile.ndim)])
    start = tile.narrow(dim, 0, count)
    start.copy_(before * (1 - share) + start * share)


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
