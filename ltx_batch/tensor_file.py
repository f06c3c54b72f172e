"""What a .safetensors file says of itself: names, shapes and places of its tensors, and its metadata. No torch.

The format (huggingface/safetensors, README): 8 bytes with the header's length, little-endian; the header, JSON, with an
entry for each tensor and texts under `__metadata__`; then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx_batch.errors import CheckpointError
from ltx_batch.storage import FileRef, open_uri, stat_uri

# Bytes of one number. Other kinds hold quantised weights, which only their own loaders understand.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}
QUANTIZED_KEY = "ltx_batch_quantized"  # in the metadata of files that `ltx-batch quantize` wrote
_INTEGERS = ("I8", "U8")
_BITSANDBYTES = (".SCB", ".weight_format")
_LARGEST_HEADER_BYTES = 100 * 10**6  # the format's own limit


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's bytes lie. `dtype` is the format's name, such as BF16; `start` counts from the file's begin."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A file's header. `source` is what messages call it."""

    source: str
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]

    def config(self) -> dict[str, Any] | None:
        """The JSON under `config` in the metadata, which official files carry since 0.9.1; None where there is none."""
        text = self.metadata.get("config")
        if text is None:
            return None
        try:
            config = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"{self.source}: the config in its metadata is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.source}: the config in its metadata is not a JSON object")
        return config


def read_tensor_file(place: str | Path, options: Mapping[str, Any] | None = None) -> TensorFile:
    """Read the header, and nothing else, of the file at a path or URI.

    Raises CheckpointError where there is no such file, or it is torn or something else, with what it seems to be.
    """
    place = str(place)
    try:
        ref = stat_uri(place, options)
        with open_uri(place, options) as file:
            start = file.read(9)
            header_bytes = int.from_bytes(start[:8], "little")
            if start[8:] != b"{" or not 2 <= header_bytes <= _LARGEST_HEADER_BYTES:
                raise CheckpointError(_not_tensors(ref, start + file.read(503)))
            text = start[8:] + file.read(header_bytes - 1)
    except (FileNotFoundError, IsADirectoryError):
        raise CheckpointError(f"{place}: there is no such file") from None
    if len(text) < header_bytes:
        raise CheckpointError(_torn(ref, 8 + header_bytes))
    return parse_header(text, ref)


def parse_header(text: bytes, ref: FileRef) -> TensorFile:
    """The header `text` of the file `ref`. Raises CheckpointError where it is none, or the file has another size."""
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", None) or {}
        data_start = 8 + len(text)
        spans = {name: entry["data_offsets"] for name, entry in entries.items()}
        tensors = {
            name: StoredTensor(ref.uri, entry["dtype"], tuple(entry["shape"]), data_start + spans[name][0])
            for name, entry in entries.items()
        }
        end = data_start + max((int(span[1]) for span in spans.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise CheckpointError(_not_tensors(ref, text[:512])) from None
    if ref.size >= 0 and ref.size != end:
        raise CheckpointError(_torn(ref, end))
    _check_kinds(ref.uri, tensors, spans, integers=QUANTIZED_KEY in metadata or any(map(_is_bitsandbytes, tensors)))
    return TensorFile(ref.uri, tensors, metadata)


def _is_bitsandbytes(name: str) -> bool:
    return name.endswith(_BITSANDBYTES)


def _check_kinds(source: str, tensors: Mapping[str, StoredTensor], spans: Mapping[str, Any], *, integers: bool) -> None:
    known = [kind for kind in ITEM_BYTES if integers or kind not in _INTEGERS]
    for name, tensor in tensors.items():
        if tensor.dtype not in known:
            raise CheckpointError(
                f"{source}: {name} is {tensor.dtype}, which is a quantised file of another program; expected "
                f"{', '.join(known)}"
            )
        if tensor.nbytes != spans[name][1] - spans[name][0]:
            raise CheckpointError(
                f"{source}: {name} of shape {list(tensor.shape)} has other bytes than its shape needs"
            )


def _torn(ref: FileRef, expected_bytes: int) -> str:
    what = "it was cut off" if ref.size < expected_bytes else "more was written to it"
    return (
        f"{ref.uri} is torn: it holds {ref.size} bytes and its header speaks of {expected_bytes}, so {what}; "
        "copy or download it again (`ltx-batch fetch` checks what it brings)"
    )


def _not_tensors(ref: FileRef, begin: bytes) -> str:
    """What the first bytes look like; wrong files mostly are what a server sent in place of the right one."""
    text = begin.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        found = (
            "a Git LFS pointer, so the weights themselves were not fetched: run `git lfs pull`, or `ltx-batch fetch`"
        )
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        found = "a web page, perhaps a server's error or login page: download the file again"
    elif text.startswith((b"pk\x03\x04", b"\x80")):
        found = "a pickled or zipped file, and pickles are not read: take the .safetensors file"
    elif text.startswith(b"gguf"):
        found = "a GGUF file: take the .safetensors file"
    elif not begin.strip(b"\0"):
        found = "empty" if ref.size == 0 else "zeros: the copy or the download broke"
    else:
        found = "something else"
    return f"{ref.uri} is not a .safetensors file but {found} ({ref.size} bytes, which begin with {begin[:16]!r})"
