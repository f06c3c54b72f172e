"""LoRA files in a worker's memory: each fetched once, checked, and let go when others need the room.

In memory and not on a disk, because a worker is ended by a kill and must leave nothing behind.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ltx_batch.errors import LoraError, StorageRefused
from ltx_batch.request import LoraRef
from ltx_batch.storage import read_uri

LIMIT_BYTES = 4 * 2**30  # some ten files of rank 64 for the 13B transformer


class LoraCache:
    """The files that were used last, by their hash. Thread-safe: the next unit's files come while this one renders."""

    def __init__(self, options: Mapping[str, Any] | None = None, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self._options, self._limit_bytes = options, limit_bytes
        self._files: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def fetch(self, lora: LoraRef) -> LoraRef:
        """The reference with its file's bytes and their hash. Raises LoraError where they are not what was hashed."""
        with self._lock:
            data = self._files.get(lora.sha256 or "")
            if data is None:
                data = self._read(lora)
            digest = lora.sha256 or hashlib.sha256(data).hexdigest()
            self._keep(digest, data)
        return replace(lora, data=data, sha256=digest)

    @property
    def held_bytes(self) -> int:
        return sum(map(len, self._files.values()))

    def _read(self, lora: LoraRef) -> bytes:
        try:
            data = read_uri(str(lora.path), self._options)
        except FileNotFoundError:
            raise LoraError(f"there is no file {lora.path}") from None
        except (OSError, StorageRefused) as error:
            raise LoraError(f"{lora.path} cannot be read: {error}") from error
        digest = hashlib.sha256(data).hexdigest()
        if lora.sha256 not in (None, digest):
            raise LoraError(f"{lora.path} has sha256 {digest}, not {lora.sha256}: it changed after it was hashed")
        return data

    def _keep(self, digest: str, data: bytes) -> None:
        """The newest stays, however large it is; the oldest go."""
        self._files[digest] = data
        self._files.move_to_end(digest)
        while self.held_bytes > self._limit_bytes and len(self._files) > 1:
            self._files.popitem(last=False)
