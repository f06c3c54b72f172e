"""A pass whose activations are too large, in chunks of tokens: the feed-forward, and the rotary tables and what they turn.

Tables are worked out anew for each chunk of each block. A token's numbers do not hang on its neighbours' here, so only a
product's rounding may change: a library may compute other row counts otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
    with ExitStack() as stack:
        if all(isinstance(block, LTXVideoTransformerBlock) for block in blocks):
            # The rotary module's own: a hook of accelerate would bring the tables of every block to the first device.
            rope = partial(type(transformer.rope).forward, transformer.rope)
            stack.enter_context(_replaced(transformer.rope, partial(_rotary_parts, rope, chunk_tokens)))
            for block in blocks:
                stack.enter_context(_replaced(block.ff, partial(_feed_forward, block.ff.forward, chunk_tokens)))
        else:
            stack.callback(_set_chunks, blocks, None)
            _set_chunks(blocks, chunk_tokens)
        yield


@contextmanager
def _replaced(layer: Any, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if before is not None:  # a hook's
            layer.forward = before


def _set_chunks(blocks: Any, chunk_tokens: int | None) -> None:
    for block in blocks:
        block.chunk_tokens = chunk_tokens


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
