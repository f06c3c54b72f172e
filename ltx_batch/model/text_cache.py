"""Embeddings in a folder or an object store, shared by all who encode with the same text encoder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ltx_batch.model.text_key import TextIdentity
from ltx_batch.storage import Storage


class TextCache:
    """CACHE/ab/<key>.safetensors: the embeddings of a text's real tokens, in the encoder's own dtype, and no text.

    Thread-safe. The first that is written stands, so that every worker renders from the same bits.
    """

    def __init__(self, storage: Storage, identity: TextIdentity) -> None:
        self._storage, self._identity = storage, identity

    @property
    def uri(self) -> str:
        return self._storage.uri

    def get(self, text: str) -> torch.Tensor | None:
        """Embeddings [tokens, channels] on the CPU; None where there are none, or none that are whole."""
        key = self._identity.key(text)
        try:
            return _unpack(self._storage.read(_name(key)), key)
        except FileNotFoundError:
            return None
        except _Torn:
            return None

    def put(self, text: str, tokens: torch.Tensor) -> torch.Tensor:
        """Keep embeddings [tokens, channels]; returns those that stand, which another writer's may be."""
        key = self._identity.key(text)
        data = _pack(tokens, key)
        if self._storage.create(_name(key), data):
            return tokens
        standing = self.get(text)
        if standing is None:  # torn: no writer of ours leaves that, so a disk or a hand did
            self._storage.replace(_name(key), data)
            return tokens
        return standing


def open_text_cache(place: str | Storage, identity: TextIdentity, options: Mapping[str, Any] | None) -> TextCache:
    return TextCache(place if isinstance(place, Storage) else Storage(place, options=options), identity)


class _Torn(ValueError):
    """What was read is not what was written."""


def _name(key: str) -> str:
    return f"{key[:2]}/{key}.safetensors"


def _pack(tokens: torch.Tensor, key: str) -> bytes:
    tokens = tokens.cpu().contiguous()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return save({"tokens": tokens}, {"key": key, "sha256": _sha256(tokens), **versions})


def _unpack(data: bytes, key: str) -> torch.Tensor:
    try:
        tokens = load(data)["tokens"]
        noted = _metadata(data)
        if (noted["key"], noted["sha256"]) != (key, _sha256(tokens)):
            raise _Torn(key)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise _Torn(key) from error
    return tokens


def _metadata(data: bytes) -> dict[str, Any]:
    """The header's notes, which safetensors gives of files alone: 8 bytes of its length, little-endian, then JSON."""
    length = int.from_bytes(data[:8], "little")
    return dict(json.loads(data[8 : 8 + length])["__metadata__"])


def _sha256(tokens: torch.Tensor) -> str:
    digest = hashlib.sha256(repr((tuple(tokens.shape), str(tokens.dtype))).encode())
    digest.update(tokens.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
