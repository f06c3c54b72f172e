"""The header of a safetensors file: names, types and shapes of its tensors, without the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

_LENGTH_BYTES = 8
_MAX_BYTES = 100_000_000  # of a header, as the format's own library has it


@dataclass(frozen=True, slots=True)
class Tensor:
    """`dtype` is the format's name, e.g. F32, BF16, F8_E4M3."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """`size_bytes` is what the whole file must measure."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    size_bytes: int


def read_header(file: BinaryIO) -> Header:
    """Read from the start of a file. Raises ValueError where it is no safetensors file.

    The format: 8 bytes of length, little-endian, then that much JSON, then the tensors
    (github.com/huggingface/safetensors, README.md).
    """
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if not 2 <= length <= _MAX_BYTES:
        raise ValueError("is not a safetensors file")
    text = file.read(length)
    try:
        data = json.loads(text)
        metadata = data.pop("__metadata__", {})
        tensors = {name: Tensor(entry["dtype"], tuple(entry["shape"])) for name, entry in data.items()}
        end = max((entry["data_offsets"][1] for entry in data.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ValueError("is not a safetensors file, or its header is torn") from None
    return Header(tensors, _texts(metadata), _LENGTH_BYTES + length + end)


def _texts(metadata: Any) -> dict[str, str]:
    return {str(name): str(value) for name, value in metadata.items()} if isinstance(metadata, dict) else {}
