"""A pass whose activations are too large, in chunks of tokens: the feed-forward, and the rotary tables and what they turn.

Tables are worked out anew for each chunk of each block. A token's numbers do not hang on its neighbours' here, so only a
product's rounding may change: a library may compute other row counts otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock, apply_rotary_emb

Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class RotaryParts:
    """The rotary tables of a call, not yet worked out: `tables(coords [1, 3, n])` are those of n tokens."""

    tables: Callable[[torch.Tensor], Tables]
    coords: torch.Tensor
    chunk_tokens: int


def rotate(values: torch.Tensor, rotary: Tables | RotaryParts | None) -> torch.Tensor:
    """Rotary embedding of `values` [rows, tokens, channels]; in parts it overwrites them."""
    if rotary is None:
        return values
    if not isinstance(rotary, RotaryParts):
        turned: torch.Tensor = apply_rotary_emb(values, rotary)
        return turned
    for part, coords in zip(
        values.split(rotary.chunk_tokens, dim=1), rotary.coords.split(rotary.chunk_tokens, dim=2), strict=True
    ):
        part.copy_(apply_rotary_emb(part, rotary.tables(coords.to(values.device))))
    return values


@contextmanager
def in_chunks(transformer: Any, chunk_tokens: int | None) -> Iterator[None]:
    """Within it, calls of `transformer` work on so many tokens at a time wherever tokens do not need each other. Blocks
    that are not diffusers' own see to that themselves, by their `chunk_tokens`."""
    if chunk_tokens is None:
        yield
        return
    blocks = transformer.transformer_blocks
    own = all(isinstance(block, LTXVideoTransformerBlock) for block in blocks)
    try:
        if own:
            _patch(transformer.rope, _rotary_parts, chunk_tokens)
        for block in blocks:
            if own:
                _patch(block.ff, _feed_forward, chunk_tokens)
            else:
                block.chunk_tokens = chunk_tokens
        yield
    finally:
        transformer.rope.__dict__.pop("forward", None)
        for block in blocks:
            block.ff.__dict__.pop("forward", None)
            if not own:
                block.chunk_tokens = None


def _patch(layer: Any, forward: Callable[..., Any], chunk_tokens: int) -> None:
    layer.forward = partial(forward, layer.forward, chunk_tokens)


def _rotary_parts(
    rope: Callable[..., Tables],
    chunk_tokens: int,
    hidden: torch.Tensor,
    num_frames: int | None,
    height: int | None,
    width: int | None,
    rope_interpolation_scale: Any,
    video_coords: torch.Tensor,
) -> RotaryParts:
    # Of its first argument the module takes the device alone, which need not be the hidden states' in every block.
    return RotaryParts(lambda coords: rope(coords, video_coords=coords), video_coords, chunk_tokens)


def _feed_forward(forward: Callable[..., torch.Tensor], chunk_tokens: int, hidden: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(hidden)
    for part, target in zip(hidden.split(chunk_tokens, dim=1), out.split(chunk_tokens, dim=1), strict=True):
        target.copy_(forward(part))
    return out
