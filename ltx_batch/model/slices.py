"""The VAE's decoder in slices of the picture, layer by layer: the numbers of a whole decode, in a part of its memory.

The decoder is local: convolutions of 3 x 3 x 3, norms of single positions, shuffles of pixels. So a layer gives a slice of its
result from a slice of its input with as many more columns on each side as it reaches. Layers are chained: each keeps the last
columns that its next slice needs and hands on what is done, so that no stage is ever whole and hardly anything is computed
twice. Only at the true edges of the picture does a layer's own padding show in what is kept. Time is not cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ltx_batch.model import memory


@dataclass(frozen=True, slots=True)
class Step:
    """A layer of the decoder, [1, C, F, H, W] to another such.

    A column of what comes out hangs on `reach` columns on each side of where it comes from; from one come `scale`.
    `work` times the bytes of what goes in are in use at once.
    """

    call: Callable[[torch.Tensor], torch.Tensor]
    reach: int
    scale: int
    work: float


def decode_in_slices(
    decoder: Any, latents: torch.Tensor, level: torch.Tensor | None, work_bytes: int
) -> Iterator[torch.Tensor]:
    """What `decoder(latents, level)` gives, slice by slice along `sliced_axis`: [1, 3, F, h, w] each.

    A layer uses about `work_bytes` at once at most, and all its columns at once where they need no more.
    """
    axis = sliced_axis(latents.shape)
    blocks, length = iter([latents]), latents.shape[axis]
    for step in decoder_steps(decoder, level, latents.element_size()):
        blocks = _through(step, blocks, length, axis, work_bytes)
        length *= step.scale
    return blocks


def sliced_axis(shape: torch.Size | tuple[int, ...]) -> int:
    """The longer side: across it a column is shorter, and more of them fit."""
    return 3 if shape[3] > shape[4] else 4


def decoder_steps(decoder: Any, level: torch.Tensor | None, number_bytes: int) -> list[Step]:
    """The layers of a LTXVideoDecoder3d of diffusers, in their order. Each is a shallow copy of the block around it in which
    only that layer is left, so that the block's own code calls it."""
    scaled = level if decoder.timestep_scale_multiplier is None else level * decoder.timestep_scale_multiplier
    nothing = nn.ModuleList()
    work = memory.SLICE_WORK[number_bytes]

    def within(block: Any, **left: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        only = _with(block, **{"conv_in": None, "upsamplers": None, "resnets": nothing, **left})
        return lambda hidden: only(hidden, scaled)

    def resnets(block: Any) -> Iterator[Step]:
        for layer in block.resnets:
            yield Step(within(block, resnets=nn.ModuleList([layer])), 2, 1, work.resnet)

    conv = decoder.conv_in
    steps = [Step(conv, 1, 1, work.convolution(conv.out_channels / conv.in_channels)), *resnets(decoder.mid_block)]
    for block in decoder.up_blocks:
        if block.conv_in is not None:
            steps.append(Step(within(block, conv_in=block.conv_in, time_embedder=None), 2, 1, work.resnet))
        for layer in block.upsamplers or ():
            growth = layer.conv.out_channels / layer.conv.in_channels
            steps.append(Step(layer, 1, layer.stride[2], work.upsampler(growth, residual=layer.residual)))
        steps += resnets(block)
    end = _with(decoder, conv_in=nn.Identity(), mid_block=_Pass(), up_blocks=nothing)
    conv = decoder.conv_out
    growth = conv.out_channels / conv.in_channels
    steps.append(Step(lambda hidden: end(hidden, level), 1, decoder.patch_size, work.end(growth)))
    return steps


class _Pass(nn.Module):
    def forward(self, hidden: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
        return hidden


def _with(module: nn.Module, **changed: Any) -> nn.Module:
    """A copy that shares all of `module` but the inner modules given here."""
    found = copy.copy(module)
    found._modules = {**module._modules, **{name: one for name, one in changed.items() if name in module._modules}}
    return found


def _through(
    step: Step, blocks: Iterator[torch.Tensor], length: int, axis: int, work_bytes: int
) -> Iterator[torch.Tensor]:
    """`step` of blocks that are `length` columns together, as blocks of what comes out."""
    kept: torch.Tensor | None = None
    known = seen = 0  # columns of `kept` whose results are out already; columns that came
    for block in blocks:
        pieces = _pieces(block, axis, step, length, work_bytes)
        del block
        while pieces:
            piece = pieces.pop(0)
            seen += piece.shape[axis]
            given = piece if kept is None else torch.cat([kept, piece], axis)
            kept = None
            del piece
            count = given.shape[axis]
            end = count if seen == length else count - step.reach
            if end <= known:
                kept = given
                continue
            start = max(0, end - step.reach)
            if seen < length:
                kept = given.narrow(axis, start, count - start).clone()
            found = [step.call(given).narrow(axis, known * step.scale, (end - known) * step.scale)]
            del given
            known = end - start
            yield found.pop()


def _pieces(block: torch.Tensor, axis: int, step: Step, length: int, work_bytes: int) -> list[torch.Tensor]:
    """`block` in equal pieces that are small enough together with what they need of their neighbours."""
    columns = block.shape[axis]
    most = int(work_bytes / (step.work * block.nbytes / columns))
    if columns == length <= most:
        return [block]
    return list(block.tensor_split(-(-columns // max(1, most - 2 * step.reach)), axis))
