"""What the headers of a checkpoint's transformer tell: its linear layers, and how they are quantised. No torch, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ltx_batch.errors import CheckpointError
from ltx_batch.lora import Shapes, shapes_in
from ltx_batch.model.fetch import checkpoint_files
from ltx_batch.model.quantize.stored import Stored, stored_form
from ltx_batch.tensor_file import TensorFile, read_tensor_file


def transformer_layers(checkpoint: str, options: Mapping[str, Any] | None = None) -> Shapes | None:
    """Names (diffusers') with out_features and in_features; None where the checkpoint cannot be looked at.

    `checkpoint` is a folder, an official single file, a URI or a hub id; nothing is downloaded.
    """
    return {
        name: shape for header in _headers(checkpoint, options) for name, shape in shapes_in(header).items()
    } or None


def transformer_stored(checkpoint: str, options: Mapping[str, Any] | None = None) -> Stored | None:
    """How the transformer is quantised already; None where it is not, or cannot be looked at. Raises CheckpointError."""
    headers = _headers(checkpoint, options)
    metadata = {key: value for header in headers for key, value in header.metadata.items()}
    return stored_form([name for header in headers for name in header.tensors], metadata, checkpoint)


def _headers(checkpoint: str, options: Mapping[str, Any] | None) -> list[TensorFile]:
    try:
        files = checkpoint_files(checkpoint, options, folders=("transformer",))
        weights = [ref.uri for name, ref in files.items() if name.endswith(".safetensors")]
        return [read_tensor_file(uri, options) for uri in weights]
    except (CheckpointError, OSError):  # which has its own message when the checkpoint is loaded
        return []
