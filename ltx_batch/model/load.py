"""From files to a pipeline."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ltx_batch.errors import CheckpointError, JobError
from ltx_batch.model.checkpoint import load_checkpoint, load_transformer
from ltx_batch.model.device import gpus, limit_memory, room
from ltx_batch.model.expected import Expected, Reading
from ltx_batch.model.parts import open_checkpoint
from ltx_batch.model.pipeline import LtxPipeline
from ltx_batch.model.placement import first_mode
from ltx_batch.model.quantize.policy import Precision
from ltx_batch.model.sizes import sizes_of
from ltx_batch.model.text_cache import TextCache

_CPU = torch.device("cpu")


def load_pipeline(
    checkpoint: Path,
    policy: Precision,
    device: torch.device,
    *,
    expected: Expected,
    text: Path | CheckpointError | None,
    upsampler: Path | None = None,
    text_precision: str = "auto",
    text_cache: TextCache | None = None,
    placement: str = "auto",
    memory_gib: float | None = None,
    attention: str = "auto",
) -> LtxPipeline:
    """`checkpoint` and `upsampler` are folders or files. `text` is the folder with text_encoder/ and tokenizer/, or what
    to raise when one is missed, or None where none is to be used; `text_precision` is as of `text_policy`. Whenever files are read they must be those of `expected`.
    `memory_gib` limits what is used of a GPU.

    Parts that may not stay on the device are loaded into host memory. Raises CheckpointError and JobError.
    """
    if placement == "sharded" and len(gpus(device)) < 2:
        raise JobError("placement sharded wants several GPUs in one worker: set worker.num_gpus to 2 or more")
    if memory_gib is not None:
        limit_memory(device, memory_gib)
    dtype: torch.dtype = getattr(torch, policy.dtype)
    with expected.weights():
        opened = open_checkpoint(checkpoint, upsampler=upsampler)
        sizes = sizes_of(opened, policy)
        to_quantise = policy.quantize is not None and opened.transformer.stored is None
        home = device if first_mode(sizes, room(device, memory_gib), placement) == "resident" else _CPU
        parts = load_checkpoint(
            checkpoint,
            dtype,
            text_encoder=text if isinstance(text, Path) else None,
            upsampler=upsampler,
            with_text=isinstance(text, Path),
            reading_text=expected.text,
            text_precision=text_precision,
            text_device=device,
            device=_CPU if to_quantise else home,
        )
    return LtxPipeline(
        parts,
        policy,
        device,
        placement=placement,
        home=home,
        memory_gib=memory_gib,
        attention=attention,
        unquantised=partial(_load_again, checkpoint, dtype, expected.weights) if to_quantise else None,
        text_missed=text if isinstance(text, CheckpointError) else None,
        text_cache=text_cache,
        text_precision=text_precision,
    )


def _load_again(checkpoint: Path, dtype: torch.dtype, reading: Reading) -> Any:
    with reading():
        return load_transformer(checkpoint, dtype)
