"""Calls of a transformer, recorded as CUDA graphs: on short sequences Python's launches take longer than the GPU's work.

A graph replays kernels on the addresses that they were recorded with. So calls are recorded only while the weights lie on
the device to stay, what differs from call to call is copied to where the recorded call read it, and keys and values of
prompts keep their places (`TextRows.steady`). The kernels are those of a plain call, and so is every bit.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

log = logging.getLogger(__name__)

# At most, of all rows of a call. On an H100 2,688 take 0.86 of the time of a plain call, 13,376 take 0.99 of it (13B,
# benchmarks/int8.py): longer calls are not worth the memory.
RECORDED_TOKENS = 16384
_REMEMBERED = 16  # graphs; a kind of call is its rows, tokens, and length of prompts to the next 64
_MARGIN = 2.0  # times a call's activations that must be to spare: the graphs' own copy of them, and gaps
_BYTES = 25.5  # of activations for each token and channel; memory.py


@dataclass(slots=True)
class _Recorded:
    graph: Any  # torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    output: torch.Tensor


class StepGraphs:
    """Calls a transformer, by a graph where one may be recorded. The first call of a kind is a plain one, which chooses
    and compiles kernels; the second is recorded. Not `recordable` are kernels that wait for the GPU, as bitsandbytes' do."""

    def __init__(self, device: torch.device, *, recordable: bool = True) -> None:
        self._device = device
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._met: set[Hashable] = set()
        self._transformer: Any = None
        self._addresses = 0
        self._spare_bytes: int | None = None  # None: this pass records and replays nothing
        self._pool: Any = None
        self._failed = not (recordable and device.type == "cuda")

    @contextmanager
    def at_work(self, transformer: Any, tokens: int, *, spare_bytes: int | None) -> Iterator[None]:
        """A pass, whose largest call has so many tokens in all its rows. `spare_bytes` are left of the device beside all
        that the pass wants; None where the transformer does not lie there to stay."""
        rows = getattr(transformer, "text_rows", None)
        short = tokens <= RECORDED_TOKENS
        # Wherever the transformer lies, such a call reads the same tokens of its prompts: else pixels hung on memory.
        with rows.steady() if rows is not None and short else nullcontext():
            if short and spare_bytes is not None and not self._failed:
                self._check(transformer)
                useful = self._recorded or spare_bytes > _wanted_bytes(transformer, tokens)
                self._spare_bytes = spare_bytes if useful and not _watched(transformer) else None
                if rows is not None and self._spare_bytes is not None:
                    rows.fix()
            try:
                yield
            finally:
                self._spare_bytes = None

    def __call__(self, transformer: Any, **inputs: Any) -> torch.Tensor:
        """What `transformer(**inputs)` returns first. Tensors among the inputs are what differs from call to call."""
        rows = getattr(transformer, "text_rows", None)
        if self._spare_bytes is None or _seen(transformer) or (rows is not None and rows.read is None):
            return _plain(transformer, inputs)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        if rows is not None:
            rows.note(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
        kind = (
            *((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()),
            None if rows is None else rows.read,
            getattr(transformer.transformer_blocks[0].attn1.processor, "_attention_backend", None),
        )
        found = self._recorded.get(kind)
        if found is None:
            if kind not in self._met or not self._may_record(inputs["hidden_states"], transformer):
                self._met.add(kind)
                return _plain(transformer, inputs)
            found = self._record(transformer, inputs, tensors)
            if found is None:
                return _plain(transformer, inputs)
            self._recorded[kind] = found
            if len(self._recorded) > _REMEMBERED:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(kind)
        if rows is not None:
            _read_prompts(transformer, inputs["encoder_hidden_states"])
        for name, tensor in tensors.items():
            found.inputs[name].copy_(tensor)
        found.graph.replay()
        return found.output.clone()

    def give_up(self) -> bool:
        """Give back what was recorded, and record nothing any more; returns whether there was anything."""
        if not self._recorded:
            return False
        self._stop()
        return True

    def _stop(self) -> None:
        self._failed, self._spare_bytes = True, None
        self.drop()

    def drop(self) -> None:
        """Forget all graphs and give their memory back."""
        self._recorded.clear()
        self._met.clear()
        self._pool = None
        rows = getattr(self._transformer, "text_rows", None)
        if rows is not None:
            rows.release()
        self._transformer = None

    def _check(self, transformer: Any) -> None:
        """Graphs of a transformer that is another one now, or lies elsewhere, are worth nothing."""
        addresses = hash(tuple(parameter.data_ptr() for parameter in transformer.parameters()))
        if self._transformer is not transformer or self._addresses != addresses:
            self.drop()
            self._transformer, self._addresses = transformer, addresses

    def _may_record(self, hidden: torch.Tensor, transformer: Any) -> bool:
        wanted = _wanted_bytes(transformer, hidden.shape[0] * hidden.shape[1])
        return self._spare_bytes is not None and self._spare_bytes > wanted

    def _record(self, transformer: Any, inputs: dict[str, Any], tensors: dict[str, torch.Tensor]) -> _Recorded | None:
        own = {name: tensor.clone() for name, tensor in tensors.items()}
        if hasattr(transformer, "text_rows"):
            _read_prompts(transformer, own["encoder_hidden_states"])
        graph = torch.cuda.CUDAGraph()
        try:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            # Other threads encode clips meanwhile, and may do what they like.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = transformer.forward(**{**inputs, **own})[0]  # past the hook that notes prompts: it waits
        except Exception as error:  # a kernel that cannot be recorded, or no memory for it
            self._stop()
            log.warning("calls are not recorded as CUDA graphs: %s: %s", type(error).__name__, error)
            return None
        return _Recorded(graph, own, output)


def _wanted_bytes(transformer: Any, tokens: int) -> float:
    """What must be to spare for a call of so many tokens in all its rows to be recorded."""
    config = transformer.config
    return _MARGIN * _BYTES * tokens * config.num_attention_heads * config.attention_head_dim


def _plain(transformer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = transformer(**inputs)[0]
    return found


def _read_prompts(transformer: Any, embeds: torch.Tensor) -> None:
    """Keys and values of prompts that are new, in all blocks."""
    if transformer.text_rows.complete:
        return
    states = transformer.caption_projection(embeds)
    for block in transformer.transformer_blocks:
        block.read_text(states)


def _watched(transformer: Any) -> bool:
    """Whether anything hooks into the blocks: a branch of a LoRA file, a block on its way from host memory."""
    return any(_hooked(module) for module in transformer.transformer_blocks.modules())


def _seen(transformer: Any) -> bool:
    """Whether somebody wants to see a call, or spatio-temporal guidance disturbs it."""
    return bool(transformer._forward_hooks) or any(
        _hooked(block) or _hooked(block.attn1) for block in transformer.transformer_blocks
    )


def _hooked(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
