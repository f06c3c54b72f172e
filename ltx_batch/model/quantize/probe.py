"""One transformer block of the real size, timed in every precision that `auto` may take, on the device itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from statistics import median

import torch
from diffusers import LTXVideoTransformer3DModel
from torch import nn

from ltx_batch.errors import PrecisionError
from ltx_batch.model.quantize.block import fuse_blocks
from ltx_batch.model.quantize.choose import CANDIDATES, choose
from ltx_batch.model.quantize.policy import Resolved, precision
from ltx_batch.model.quantize.swap import check_device, quantize_model

TOKENS = 13_376  # of 704 x 1216 pixels and 121 frames
_TEXT_TOKENS = 256
_REPEATS = 5
_MOST_ERROR = 0.2  # of what a block adds: int8 errs by 2 %, fp8 by 6 %, a kernel that is wrong by all of it
_found: dict[tuple[int, int, int], Resolved] = {}  # by channels, tokens and GPU
log = logging.getLogger(__name__)


def best_precision(channels: int, device: torch.device, *, tokens: int = TOKENS) -> Resolved:
    """What `auto` becomes for a transformer of so many channels; the reason is logged."""
    times_s, refused = probe(channels, device, tokens=tokens)
    chosen, reason = choose(times_s, refused=refused)
    found = Resolved(chosen, f"{reason}, for {tokens} tokens of {channels} channels")
    log.info("precision auto is %s: %s", *found)
    return found


def best_precision_here(channels: int, tokens: int | None = None) -> Resolved | None:
    """On the GPU of this process, timed once: what is loaded again renders the same bits. None where there is none."""
    if not torch.cuda.is_available():
        return None
    key = (channels, tokens or TOKENS, torch.cuda.current_device())
    found = _found.get(key) or best_precision(channels, torch.device("cuda", key[2]), tokens=key[1])
    if "out of memory" not in found.reason:  # which passes
        _found[key] = found
    return found


def probe(channels: int, device: torch.device, *, tokens: int) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of one block by precision, and why others were left out: they do not run here, or compute something else."""
    times_s: dict[str, float] = {}
    refused: dict[str, str] = {}
    added: torch.Tensor | None = None
    for name in CANDIDATES:
        try:
            run = _block_of(name, channels, device, tokens)
            found = run()
            added = found if added is None else added
            _check(found, added)
            times_s[name] = _median_s(run, device)
        except Exception as error:  # whatever a kernel says of a GPU that it was not made for
            refused[name] = str(error).partition("\n")[0].split("; ")[0] or type(error).__name__
            if added is None:
                break  # without bf16 there is nothing to hold the others against
    return times_s, refused


def _block_of(name: str, channels: int, device: torch.device, tokens: int) -> Callable[[], torch.Tensor]:
    """A call of one block of that precision: what it adds to hidden states [1, N, D], always of the same weights."""
    policy = precision(name, "cuda", keep_blocks=0)
    check_device(policy, device)
    draw = torch.Generator(device).manual_seed(0)
    model = _one_block(channels, device, draw)
    quantize_model(model, policy, device)
    if name == "int8":
        fuse_blocks(model)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.bfloat16, device=device)

    hidden, text, temb = drawn(1, tokens, channels), drawn(1, _TEXT_TOKENS, channels), drawn(1, 1, 6 * channels)
    rope = model.rope(hidden, video_coords=torch.rand(1, 3, tokens, generator=draw, device=device))
    mask = torch.zeros(1, 1, _TEXT_TOKENS, dtype=torch.bfloat16, device=device)

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return model.transformer_blocks[0](hidden, text, temb, rope, mask) - hidden

    return run


def _check(found: torch.Tensor, added: torch.Tensor) -> None:
    error = float((found.float() - added.float()).norm() / added.float().norm())
    if not error < _MOST_ERROR:
        raise PrecisionError(f"its numbers are off by {error:.0%} here")


def _one_block(channels: int, device: torch.device, draw: torch.Generator) -> LTXVideoTransformer3DModel:
    """32 heads, as in the 13B and in the 2B, where the channels allow it."""
    head = next((size for size in (128, 64, 32) if channels % size == 0 and channels // size >= 32), 16)
    with torch.device("meta"):
        model = LTXVideoTransformer3DModel(
            num_layers=1,
            num_attention_heads=channels // head,
            attention_head_dim=head,
            cross_attention_dim=channels,
            caption_channels=64,
        )
    nn.Module.to(model, torch.bfloat16)  # diffusers' own warns of layers that this model has not
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02, generator=draw)
    return model


def _median_s(run: Callable[[], object], device: torch.device) -> float:
    times_s = []
    for _ in range(1 + _REPEATS):  # the first one compiles and tunes
        _wait(device)
        started_s = time.perf_counter()
        run()
        _wait(device)
        times_s.append(time.perf_counter() - started_s)
    return median(times_s[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
