"""Self-attention: one kernel of several, the one that is asked for or the fastest of torch's on the shape that a pass has."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from ltx_batch.model.chunks import rotate

_TORCH = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_DIFFUSERS = {"native": None, **{name: f"_native_{name}" for name in _TORCH}, "sage": "sage"}
# What a stopwatch may choose among: exact up to rounding. Sage rounds to int8, and is asked for by its name alone.
CANDIDATES = ("native", *_TORCH)
_REPEATS = 3
# Another kernel rounds otherwise: torch's own choice stays where it is about as fast, so that two GPUs of a kind agree.
_BETTER_BY = 1.05
log = logging.getLogger(__name__)

Shape = tuple[int, int, int, int]  # rows, heads, tokens, channels of a head


@dataclass(slots=True)
class Kernel:
    """What a transformer's self-attention is computed by, for all its blocks. `asked` is auto, native (torch's own choice)
    or sage; `name` is the kernel that works now."""

    asked: str = "auto"
    name: str = "native"
    timed_ms: dict[Shape, dict[str, float]] = field(default_factory=dict)
    _chosen: list[str] = field(default_factory=list)

    def choose(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        """The kernel for a pass of one clip, of this shape. With `auto` the fastest of torch's on this device: the first
        pass of a shape times them all. On a CPU, and in fp32, there is only one."""
        if self.asked != "auto":
            self.name = self.asked
        elif device.type == "cuda" and dtype != torch.float32:
            if shape not in self.timed_ms:
                self.timed_ms[shape] = {name: _time_ms(name, shape, dtype, device) for name in CANDIDATES}
                told = ", ".join(f"{name} {ms:.2f} ms" for name, ms in self.timed_ms[shape].items())
                log.info("attention of %s: %s", "x".join(map(str, shape)), told)
            self.name = fastest(self.timed_ms[shape])
        self._chosen.append(self.name)

    def taken(self) -> str:
        """The kernels of all passes since this was last asked, `flash` or, where passes differ, `flash, native`."""
        names, self._chosen = dict.fromkeys(self._chosen), []
        return ", ".join(names)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """[rows, heads, tokens, channels of a head] each, and no mask."""
        return attend(self.name, query, key, value)


def fastest(timed_ms: dict[str, float]) -> str:
    """The name with the least time; native unless another one is faster by more than timings vary."""
    best = min(timed_ms, key=lambda name: timed_ms[name])
    return best if timed_ms["native"] > _BETTER_BY * timed_ms[best] else "native"


def attend(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of that kernel, [rows, heads, tokens, channels of a head]. Raises RuntimeError where it cannot run."""
    if name == "sage":
        found: torch.Tensor = _sage()(query, key, value, tensor_layout="HND", is_causal=False)
        return found
    if name == "native":
        return scaled_dot_product_attention(query, key, value)
    with sdpa_kernel(_TORCH[name]):
        return scaled_dot_product_attention(query, key, value)


class SelfAttention:
    """Processor of diffusers' `LTXAttention` without a mask: what `LTXVideoAttnProcessor` computes, by `kernel`."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    @property
    def _attention_backend(self) -> str | None:
        """The same kernel by diffusers' name, for blocks that call `dispatch_attention_fn` themselves."""
        return _DIFFUSERS[self.kernel.name]

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> torch.Tensor:
        query = rotate(attn.norm_q(attn.to_q(hidden_states)), image_rotary_emb)
        key = rotate(attn.norm_k(attn.to_k(hidden_states)), image_rotary_emb)
        heads = (
            tensor.unflatten(2, (attn.heads, -1)).transpose(1, 2) for tensor in (query, key, attn.to_v(hidden_states))
        )
        mixed = self.kernel(*heads).transpose(1, 2).flatten(2, 3).to(hidden_states.dtype)
        out: torch.Tensor = attn.to_out[0](mixed)
        return out


def use_kernel(transformer: Any, asked: str = "auto") -> Kernel:
    """Have self-attention computed by the kernel that is returned. Blocks with a processor of their own keep it."""
    kernel = Kernel(asked)
    for block in transformer.transformer_blocks:
        if type(block.attn1.processor) is LTXVideoAttnProcessor:
            block.attn1.set_processor(SelfAttention(kernel))
    return kernel


@lru_cache
def _sage() -> Callable[..., torch.Tensor]:
    found: Callable[..., torch.Tensor] = import_module("sageattention").sageattn
    return found


def _time_ms(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Median of some calls after a first; infinite where the kernel cannot run here."""
    try:
        rows, heads, tokens, channels = shape
        inputs = [
            torch.randn(rows, tokens, heads, channels, dtype=dtype, device=device).transpose(1, 2) for _ in range(3)
        ]
        attend(name, *inputs)
        times = []
        for _ in range(_REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            attend(name, *inputs)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times)
    except Exception as error:  # whatever a kernel says of a shape or a device that it was not made for
        log.debug("attention kernel %s cannot run: %s", name, error)
        return float("inf")
