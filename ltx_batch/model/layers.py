"""The linear layers of a checkpoint's transformer, from the headers of its files: no torch, and no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltx_batch.errors import CheckpointError
from ltx_batch.lora import Shapes, read_header, shapes_in
from ltx_batch.model.fetch import checkpoint_files
from ltx_batch.storage import is_local_uri, open_uri

_SINGLE = ".safetensors"


def transformer_layers(checkpoint: str, options: Mapping[str, Any] | None = None) -> Shapes | None:
    """Names (diffusers') with out_features and in_features; None where the checkpoint is not at hand.

    `checkpoint` is a folder, a single file or a URI; of a hub id nothing is fetched here.
    """
    if is_local_uri(checkpoint) and not Path(checkpoint.removeprefix("file://")).expanduser().exists():
        return None
    try:
        shapes: dict[str, tuple[int, int]] = {}
        for uri in _weight_files(checkpoint, options):
            with open_uri(uri, options) as file:
                shapes |= shapes_in(read_header(file))
    except (CheckpointError, OSError, ValueError):  # which has its own message when the checkpoint is loaded
        return None
    return shapes or None


def _weight_files(checkpoint: str, options: Mapping[str, Any] | None) -> list[str]:
    if checkpoint.endswith(_SINGLE):
        return [checkpoint]
    files = checkpoint_files(checkpoint, options)
    return [ref.uri for name, ref in files.items() if name.startswith("transformer/") and name.endswith(_SINGLE)]
