"""From files to a pipeline."""

from __future__ import annotations

from pathlib import Path

import torch

from ltx_batch.errors import CheckpointError
from ltx_batch.model.checkpoint import load_checkpoint
from ltx_batch.model.pipeline import LtxPipeline
from ltx_batch.model.quantize.policy import Precision
from ltx_batch.model.text_cache import TextCache


def load_pipeline(
    checkpoint: Path,
    policy: Precision,
    device: torch.device,
    *,
    text: Path | CheckpointError | None,
    upsampler: Path | None = None,
    text_cache: TextCache | None = None,
) -> LtxPipeline:
    """`checkpoint` and `upsampler` are folders or files. `text` is the folder with text_encoder/ and tokenizer/, or what
    to raise when one is missed, or None where none is to be used. Raises CheckpointError."""
    parts = load_checkpoint(
        checkpoint,
        getattr(torch, policy.dtype),
        text_encoder=text if isinstance(text, Path) else None,
        upsampler=upsampler,
        with_text=isinstance(text, Path),
        device=device if policy.quantize is None else torch.device("cpu"),
    )
    missed = text if isinstance(text, CheckpointError) else None
    return LtxPipeline(parts, policy, device, text_missed=missed, text_cache=text_cache)
