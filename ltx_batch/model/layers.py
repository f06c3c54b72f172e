"""The linear layers of a checkpoint's transformer, from the headers of its files: no torch, and no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ltx_batch.errors import CheckpointError
from ltx_batch.lora import Shapes, shapes_in
from ltx_batch.model.fetch import checkpoint_files
from ltx_batch.tensor_file import read_tensor_file


def transformer_layers(checkpoint: str, options: Mapping[str, Any] | None = None) -> Shapes | None:
    """Names (diffusers') with out_features and in_features; None where the checkpoint cannot be looked at.

    `checkpoint` is a folder, an official single file, a URI or a hub id; nothing is downloaded.
    """
    try:
        files = checkpoint_files(checkpoint, options, folders=("transformer",))
        weights = [ref.uri for name, ref in files.items() if name.endswith(".safetensors")]
        headers = [read_tensor_file(uri, options) for uri in weights]
    except (CheckpointError, OSError):  # which has its own message when the checkpoint is loaded
        return None
    return {name: shape for header in headers for name, shape in shapes_in(header).items()} or None
