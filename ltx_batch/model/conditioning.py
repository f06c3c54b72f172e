"""Conditioning media to tokens, by the official rules (LTX-Video, pipelines/pipeline_ltx_video.py, prepare_conditioning).

At frame 0 the encoded media replaces noise. A later single frame becomes extra tokens that carry its time. Of a later
sequence the first two latent frames become extra tokens (the VAE encoded them as the start of a clip, which they are
not here), and the rest replaces noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import interpolate

from ltx_batch.model.latents import from_tokens, normalize, to_tokens, token_coords
from ltx_batch.model.noise import Noise, draw_rows
from ltx_batch.model.plan import TEMPORAL, PassPlan
from ltx_batch.model.preprocess import ConditionItem
from ltx_batch.model.tiles import Tiles

_PREFIX = 2  # latent frames of a later sequence that become extra tokens


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a denoise pass starts from. The first `extra` tokens only condition and are dropped at its end.

    `latents` fp32 [B, N, C]; `coords` [1, 3, N] (seconds, rows, columns); `strengths` [1, N], how much of each token is
    given (1 is never denoised), or None where nothing is. Rows of a batch share the last two.
    """

    latents: torch.Tensor
    coords: torch.Tensor
    strengths: torch.Tensor | None = None
    extra: int = 0


def start_tokens(
    plan: PassPlan,
    rows: Sequence[Sequence[ConditionItem]],
    noises: Sequence[Noise],
    vae: Any,
    channels: int,
    frame_rate: float,
    *,
    begin: torch.Tensor | None = None,
    causal: bool = True,
    device: torch.device | None = None,
) -> Tokens:
    """Noise, or `begin` (normalised latents fp32 [B, C, F, H, W]) at the pass's first noise level, with each row's
    conditions placed in it. Rows have equally many items of equal frames, starts and strengths; `causal` as in
    `token_coords`."""
    size, device = plan.latent_size, device or vae.device
    noise = draw_rows(noises, f"{plan.name}.init", (plan.tokens, channels), device)
    if begin is not None:
        noise = plan.sigmas[0] * noise + (1 - plan.sigmas[0]) * to_tokens(begin)
    place = partial(token_coords, frame_rate=frame_rate, causal=causal, device=device)
    coords = place(size, start_frame=0)
    if not rows[0]:
        return Tokens(noise, coords)
    latents = from_tokens(noise, size).clone()
    strengths = torch.zeros(1, 1, *size, device=device)
    extra: list[Tokens] = []
    for index, items in enumerate(zip(*rows, strict=True)):
        start, strength = items[0].start_frame, items[0].strength
        media = encode_media(
            [item.pixels for item in items], plan, noises, f"{plan.name}.vae_sample.{index}", vae, device
        )
        free = 0 if start == 0 else 1 if media.shape[2] == 1 else _PREFIX
        if media.shape[2] > free:
            # `free` latent frames at the front are not placed in the clip itself.
            placed = slice(start // TEMPORAL + free, start // TEMPORAL + media.shape[2])
            latents[:, :, placed] = torch.lerp(latents[:, :, placed], media[:, :, free:], strength)
            strengths[:, :, placed] = strength
        if free:
            name = f"{plan.name}.condition.{index}"
            extra.append(_extra_tokens(media[:, :, :free], start, strength, noises, name, place))
    return _join(extra, Tokens(to_tokens(latents), coords, strengths.flatten(1)))


def encode_media(
    media: Sequence[torch.Tensor],
    plan: PassPlan,
    noises: Sequence[Noise],
    name: str,
    vae: Any,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Pixels fp32 [1, 3, F, H, W] of each row, brought to the pass's size, to normalised latents fp32 [B, C, F, H, W],
    sampled from what the VAE says of them."""
    device = device or vae.device
    found = []
    for pixels, noise in zip(media, noises, strict=True):
        sized = resize(pixels.to(device), plan.height, plan.width)
        distribution = vae.encode(sized.to(vae.dtype)).latent_dist
        mean, deviation = distribution.mean.float(), distribution.std.float()
        found.append(mean + deviation * noise(name, tuple(mean.shape)).to(device))
    return normalize(torch.cat(found), vae)


@contextmanager
def in_tiles(vae: Any, tiles: Tiles | None) -> Iterator[None]:
    """Within it, `vae.encode` works tile by tile, as diffusers does it."""
    if tiles is None:
        yield
        return
    step = (tiles.height - tiles.overlap, tiles.width - tiles.overlap)
    vae.enable_tiling(
        tile_sample_min_height=tiles.height,
        tile_sample_min_width=tiles.width,
        tile_sample_stride_height=step[0],
        tile_sample_stride_width=step[1],
    )
    try:
        yield
    finally:
        vae.disable_tiling()


def resize(video: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[1, C, F, H, W], frame by frame, bilinearly; pipeline_ltx_video.py, resize_tensor."""
    if video.shape[-2:] == (height, width):
        return video
    frames = interpolate(video[0].transpose(0, 1), size=(height, width), mode="bilinear", align_corners=False)
    return frames.transpose(0, 1).unsqueeze(0)


def _extra_tokens(
    media: torch.Tensor,
    start: int,
    strength: float,
    noises: Sequence[Noise],
    name: str,
    place: Callable[..., torch.Tensor],
) -> Tokens:
    noise = draw_rows(noises, name, tuple(media.shape[1:]), media.device)
    latents = to_tokens(torch.lerp(noise, media, strength))
    return Tokens(
        latents,
        place(media.shape[2:], start_frame=start),
        torch.full((1, latents.shape[1]), strength, device=media.device),
    )


def _join(extra: Sequence[Tokens], clip: Tokens) -> Tokens:
    parts = [*extra, clip]
    return Tokens(
        torch.cat([part.latents for part in parts], dim=1),
        torch.cat([part.coords for part in parts], dim=2),
        torch.cat([part.strengths for part in parts if part.strengths is not None], dim=1),
        sum(part.latents.shape[1] for part in extra),
    )
