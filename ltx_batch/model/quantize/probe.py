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
from ltx_batch.model.quantize.policy import precision
from ltx_batch.model.quantize.swap import check_device, quantize_model

TOKENS = 13_376  # of 704 x 1216 pixels and 121 frames
_TEXT_TOKENS = 256
_REPEATS = 5
log = logging.getLogger(__name__)


def best_precision(channels: int, device: torch.device, *, tokens: int = TOKENS) -> str:
    """What `auto` becomes for a transformer of so many channels; the reason is logged."""
    times_s, refused = probe(channels, device, tokens=tokens)
    chosen, reason = choose(times_s, refused=refused)
    log.info("precision auto is %s: %s, for %d tokens of %d channels", chosen, reason, tokens, channels)
    return chosen


def best_precision_here(channels: int) -> str | None:
    """On the GPU of this process; None where there is none."""
    return (
        best_precision(channels, torch.device("cuda", torch.cuda.current_device()))
        if torch.cuda.is_available()
        else None
    )


@torch.inference_mode()
def probe(channels: int, device: torch.device, *, tokens: int) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of one block by precision, and why others were left out."""
    times_s: dict[str, float] = {}
    refused: dict[str, str] = {}
    for name in CANDIDATES:
        try:
            times_s[name] = _time_s(name, channels, device, tokens)
        except (PrecisionError, torch.cuda.OutOfMemoryError) as error:
            refused[name] = str(error).split("; ")[0]
    return times_s, refused


def _time_s(name: str, channels: int, device: torch.device, tokens: int) -> float:
    policy = precision(name, "cuda", keep_blocks=0)
    check_device(policy, device)
    model = _one_block(channels, device)
    quantize_model(model, policy, device)
    if name == "int8":
        fuse_blocks(model)
    hidden = torch.randn(1, tokens, channels, dtype=torch.bfloat16, device=device)
    text = torch.randn(1, _TEXT_TOKENS, channels, dtype=torch.bfloat16, device=device)
    temb = torch.randn(1, 1, 6 * channels, dtype=torch.bfloat16, device=device)
    rope = model.rope(hidden, video_coords=torch.rand(1, 3, tokens, device=device))
    mask = torch.zeros(1, 1, _TEXT_TOKENS, dtype=torch.bfloat16, device=device)
    return _median_s(lambda: model.transformer_blocks[0](hidden, text, temb, rope, mask), device)


def _one_block(channels: int, device: torch.device) -> LTXVideoTransformer3DModel:
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
        parameter.normal_(std=0.02)
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
