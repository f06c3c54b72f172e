"""Spatio-temporal guidance: disturb attention in some blocks for some rows of a call (arXiv 2411.18664).

The four modes and their names: Lightricks/LTX-Video, ltx_video/utils/skip_layer_strategy.py; what each does:
ltx_video/models/transformers/attention.py. In the official release's blocks `residual` changes nothing, since their
attention layers add no residual of their own, so it changes nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# (the layer, what went in [rows, N, C]) -> what comes out in place of the layer's own answer
_Replace = Callable[[Any, torch.Tensor], torch.Tensor]


def _attention_values(attention: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Each token attends to itself alone."""
    out: torch.Tensor = attention.to_out[0](attention.to_v(hidden))
    return out


def _attention_skip(attention: Any, hidden: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = attention.to_out[0](hidden)
    return out


def _transformer_block(block: Any, hidden: torch.Tensor) -> torch.Tensor:
    return hidden


@contextmanager
def perturbed(transformer: Any, mode: str, blocks: Sequence[int], rows: int) -> Iterator[None]:
    """Within it, calls of `transformer` are disturbed in `blocks` for the last `rows` of their batch.

    Raises IndexError where the transformer has no such block, KeyError for an unknown mode.
    """
    replace: _Replace | None = {
        "attention_values": _attention_values,
        "attention_skip": _attention_skip,
        "transformer_block": _transformer_block,
        "residual": None,
    }[mode]
    if replace is None:
        yield
        return
    chosen = [transformer.transformer_blocks[index] for index in blocks]
    layers: list[nn.Module] = chosen if mode == "transformer_block" else [block.attn1 for block in chosen]

    def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        return torch.cat([output[:-rows], replace(layer, hidden[-rows:])])

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
