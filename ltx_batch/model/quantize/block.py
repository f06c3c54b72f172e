"""LTX-Video's transformer block around fused kernels: what diffusers' block computes, in a third of the passes over memory.

Norm, modulation and rounding to int8 are one kernel, whose rows query, key and value share in one product; norm and
rotary embedding of query and key are one; GELU belongs to the rounding before the second feed-forward product; gate and
residual to the product before them. GELU is not part of the first product, as the scale of a row is known only when all of
the row is: rounding there would take another pass anyhow, and in that pass GELU costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Self

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_ltx import LTXVideoTransformerBlock
from torch import nn
from torch.func import functional_call

from ltx_batch.model.quantize.linear import Int8Linear, biases
from ltx_batch.model.quantize.ops import attend_text, int8_product, modulate_rows, norm_rotate, quantize_modulated
from ltx_batch.model.quantize.reference import ada
from ltx_batch.model.quantize.rope import HalfRope, Tables, whole
from ltx_batch.model.quantize.text_rows import KeysValues, TextRows, watch

# Lines of scale_shift_table and of the time embedding; the scale is the line behind its shift.
_ATTENTION_SHIFT, _ATTENTION_GATE, _FEED_FORWARD_SHIFT, _FEED_FORWARD_GATE = 0, 2, 3, 5

# int8 rows with their scales, for an Int8Linear, or rows in 16 bits, for any other layer
Rows = tuple[torch.Tensor, torch.Tensor] | torch.Tensor


class FusedBlock(nn.Module):
    """Takes over a block's layers, under their names. Any of them may be quantised or not.

    Hooks stay what they are: a layer that has some is called, and so is `attn1` as a whole where it has some.
    """

    def __init__(
        self, block: LTXVideoTransformerBlock, number: int, text: TextRows, built: set[Hashable] | None = None
    ) -> None:
        super().__init__()
        self.norm1, self.attn1, self.norm2, self.attn2 = block.norm1, block.attn1, block.norm2, block.attn2
        self.ff, self.scale_shift_table = block.ff, block.scale_shift_table
        self._number, self._text = number, text
        self._built = set() if built is None else built  # kinds of calls, of all blocks
        self.chunk_tokens: int | None = None  # tokens that the feed-forward works on at a time; None for all
        self._compiled: Callable[..., torch.Tensor] | None = None
        self._pack()

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Tables,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As diffusers' block; `image_rotary_emb` are HalfRope's tables."""
        keys, values = self._text.of(self._number, encoder_hidden_states, self._project)
        given = (hidden_states, temb, *image_rotary_emb, keys, values, self._text.mask(encoder_attention_mask))
        if self._compiled is not None:
            return self._compiled(*given)
        if hidden_states.is_cuda and not _hooked(self.attn1):
            self._build(*given)
        return self._compute(*given)

    def _build(self, *given: Any) -> None:
        """Compile the kernels of a call that is the first of its kind."""
        attention, feed_forward = (self.attn1.to_q, self.attn1.to_out[0]), (self.ff.net[0].proj, self.ff.net[2])
        layers = (*attention, self.attn2.to_q, self.attn2.to_out[0], *feed_forward)
        shapes = (None if tensor is None else tensor.shape for tensor in given)
        kind = (*map(type, layers), *shapes, given[0].dtype, given[0].device, self.chunk_tokens)
        if kind in self._built or torch.cuda.is_current_stream_capturing():
            return
        from ltx_batch.model.quantize.kernels.start import only_building

        with only_building():
            self._compute(*given)  # of numbers that nobody wrote
        self._built.add(kind)

    def read_text(self, encoder_hidden_states: torch.Tensor) -> None:
        """Work out the keys and values of prompts that are new, as a call does first."""
        self._text.of(self._number, encoder_hidden_states, self._project)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what happens in every call, and leave out the prompt's keys and values."""
        self._compiled = torch.compile(self._compute, *args, **kwargs)

    @property
    def parked_layers(self) -> tuple[nn.Module, ...]:
        """Those that work once a clip: beside a GPU they wait in page-locked host memory, an eighth of all weights."""
        return self.attn2.to_k, self.attn2.to_v

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """What moves the block: parked layers go to the GPU and come back, and what lay together lies together again."""
        super()._apply(fn, recurse)
        self._pack()
        with torch.inference_mode(False):
            for parameter in (parameter for layer in self.parked_layers for parameter in layer.parameters()):
                if parameter.device.type == "cuda":
                    parameter.data = parameter.data.cpu().pin_memory()
        return self

    def _pack(self) -> None:
        """Lay the int8 weights of query, key and value behind each other, which Hopper's kernel wants of one product."""
        layers = (self.attn1.to_q, self.attn1.to_k, self.attn1.to_v)
        if all(isinstance(layer, Int8Linear) for layer in layers):
            with torch.inference_mode(False):  # a parameter's data must not be an inference tensor
                whole = torch.cat([layer.weight.data for layer in layers])
                for layer, weight in zip(layers, whole.chunk(3), strict=True):
                    layer.weight.data = weight

    def _project(self, states: torch.Tensor) -> KeysValues:
        keys = self.attn2.norm_k(_call_here(self.attn2.to_k, states))
        return keys, _call_here(self.attn2.to_v, states)

    def _compute(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        shape, lines = hidden_states.shape, temb.flatten(0, 1)
        hidden = hidden_states.flatten(0, 1)
        hidden = self._attend_self(hidden, lines, cos, sin, shape)
        hidden = self._attend_text(hidden, lines, keys, values, mask, shape)
        if self.chunk_tokens is None:
            return self._feed_forward(hidden, lines).view(shape)
        return self._feed_forward_in_chunks(hidden.view(shape), lines.unflatten(0, (shape[0], -1)), self.chunk_tokens)

    def _attend_self(
        self, hidden: torch.Tensor, lines: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shape: torch.Size
    ) -> torch.Tensor:
        attention = self.attn1
        layers = [attention.to_q, attention.to_k, attention.to_v]
        rows = self._modulated(hidden, lines, _ATTENTION_SHIFT, layers)
        if _hooked(attention):
            assert isinstance(rows, torch.Tensor)
            out = attention(hidden_states=rows.view(shape), image_rotary_emb=whole((cos, sin)))
            return self._gated(hidden, out.flatten(0, 1), lines, _ATTENTION_GATE)
        if isinstance(rows, torch.Tensor):
            query, key, value = attention.to_q(rows), attention.to_k(rows), attention.to_v(rows)
        else:
            query, key, value = _product(layers, rows, hidden.dtype).chunk(3, dim=1)
        query, key = norm_rotate(
            query,
            key,
            attention.norm_q.weight,
            attention.norm_k.weight,
            cos.flatten(0, 1),
            sin.flatten(0, 1),
            attention.norm_q.eps,
        )
        del rows
        query, key, value = (x.unflatten(0, shape[:2]) for x in (query, key, value))
        out = _attend(attention, query, key, value)
        del query, key, value
        return self._added(attention.to_out[0], out, hidden, lines, _ATTENTION_GATE)

    def _attend_text(
        self,
        hidden: torch.Tensor,
        lines: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        shape: torch.Size,
    ) -> torch.Tensor:
        attention = self.attn2
        norm = attention.norm_q
        query = attention.to_q(hidden.view(shape)).flatten(0, 1)
        out = attend_text(query, norm.weight, keys, values, mask, attention.heads, norm.eps)
        return self._added(attention.to_out[0], out, hidden, lines, None)

    def _feed_forward(self, hidden: torch.Tensor, lines: torch.Tensor) -> torch.Tensor:
        up, down = self.ff.net[0].proj, self.ff.net[2]
        rows = self._modulated(hidden, lines, _FEED_FORWARD_SHIFT, [up])
        middle = up(rows) if isinstance(rows, torch.Tensor) else _product([up], rows, hidden.dtype)
        del rows  # here and elsewhere: what is not needed makes room for what comes
        if _takes_int8([down]):
            rows = down.quantize(middle, gelu=True)
            del middle
        else:
            rows = torch.ops.aten.gelu_(middle, approximate="tanh")
        return self._added(down, rows, hidden, lines, _FEED_FORWARD_GATE)

    def _feed_forward_in_chunks(self, hidden: torch.Tensor, lines: torch.Tensor, chunk_tokens: int) -> torch.Tensor:
        """`hidden` [B, N, D], `lines` [B, 1 or N, 6 * D]: one row of the batch after the other."""
        out = torch.empty_like(hidden)
        for row, row_lines, target in zip(hidden, lines, out, strict=True):
            parts = row.split(chunk_tokens)
            lines_of_parts = [row_lines] * len(parts) if len(row_lines) == 1 else row_lines.split(chunk_tokens)
            for part, part_lines, place in zip(parts, lines_of_parts, target.split(chunk_tokens), strict=True):
                place.copy_(self._feed_forward(part, part_lines))
        return out

    def _modulated(self, hidden: torch.Tensor, lines: torch.Tensor, slot: int, layers: Sequence[nn.Module]) -> Rows:
        """What these layers share as their input."""
        table = self.scale_shift_table
        if _takes_int8(layers) and not (slot == _ATTENTION_SHIFT and _hooked(self.attn1)):
            return quantize_modulated(hidden, table, lines, slot, self.norm1.eps, layers[0].hadamard_group)
        return modulate_rows(hidden, table, lines, slot, self.norm1.eps)

    def _added(
        self, layer: Any, rows: Rows, hidden: torch.Tensor, lines: torch.Tensor, slot: int | None
    ) -> torch.Tensor:
        """`hidden` plus what the layer makes of the rows, by the gate of that slot."""
        if _takes_int8([layer]):
            rows = layer.quantize(rows) if isinstance(rows, torch.Tensor) else rows
            gate = (None, None, 0) if slot is None else (self.scale_shift_table, lines, slot)
            return _product([layer], rows, hidden.dtype, hidden, *gate)
        return self._gated(hidden, layer(rows), lines, slot)

    def _gated(self, hidden: torch.Tensor, out: torch.Tensor, lines: torch.Tensor, slot: int | None) -> torch.Tensor:
        if slot is None:
            return hidden + out
        gate = ada(self.scale_shift_table, lines, slot).to(hidden.dtype)[:, None]
        count = len(lines)
        return torch.addcmul(hidden.unflatten(0, (count, -1)), out.unflatten(0, (count, -1)), gate).flatten(0, 1)


def fuse_blocks(transformer: Any) -> int:
    """Put fused blocks in the place of diffusers', quantised or not; returns how many. State keeps its names.

    Blocks that the kernels do not fit (other norms or activations than LTX-Video has) all stay as they are.
    """
    blocks = transformer.transformer_blocks
    if not all(_fits(block) for block in blocks):
        return 0
    text = TextRows()
    built: set[Hashable] = set()
    for number, block in enumerate(blocks):
        blocks[number] = FusedBlock(block, number, text, built)
    transformer.rope = HalfRope.of(transformer.rope)
    transformer._repeated_blocks = [FusedBlock.__name__]  # what diffusers' compile_repeated_blocks looks for
    watch(transformer, text)
    return len(blocks)


def _fits(block: Any) -> bool:
    if not isinstance(block, LTXVideoTransformerBlock):
        return False
    first = block.ff.net[0]
    return (
        block.norm1.weight is None
        and block.norm2.weight is None
        and block.norm1.eps == block.norm2.eps
        and isinstance(first, GELU)
        and first.approximate == "tanh"
        and block.attn1.head_dim * block.attn1.heads == block.attn1.inner_kv_dim
    )


def _attend(attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Heads attend, by the backend that diffusers was told: [B, N, D] each, out [B * N, D]."""
    heads = (x.unflatten(2, (attention.heads, -1)) for x in (query, key, value))
    out = dispatch_attention_fn(*heads, backend=attention.processor._attention_backend)
    return out.flatten(2).flatten(0, 1)


def _product(
    layers: Sequence[Any],
    rows: Rows,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    lines: torch.Tensor | None = None,
    slot: int = 0,
) -> torch.Tensor:
    weights, scales = [layer.weight for layer in layers], [layer.weight_scale for layer in layers]
    return int8_product(*rows, weights, scales, biases(list(layers)), dtype, residual, table, lines, slot)


def _takes_int8(layers: Sequence[nn.Module]) -> bool:
    """Whether all of them can be given the same int8 rows: none has a hook, which must see what it was made for."""
    groups = {layer.hadamard_group if isinstance(layer, Int8Linear) else None for layer in layers}
    return len(groups) == 1 and None not in groups and not any(map(_hooked, layers))


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _call_here(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Call it where `x` is, with its weights brought there for the call."""
    here = {name: parameter.to(x.device, non_blocking=True) for name, parameter in layer.named_parameters()}
    out: torch.Tensor = functional_call(layer, here, (x,))
    return out
