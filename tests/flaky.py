"""A store in memory whose operations fail as scripted: `flaky://`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Denied(PermissionError):
    pass


class FlakyFileSystem(MemoryFileSystem):
    """`script` maps an operation to the faults of its next calls, in order.

    `reset`: the connection breaks before anything happened. `lost`: it happened, and the answer is lost. `cut`: half of
    the bytes arrive. `denied`: refused. `ok`: no fault.
    """

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    script: ClassVar[dict[str, list[str]]] = {}
    calls: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    @contextlib.contextmanager
    def _fault(self, operation: str) -> Iterator[str]:
        self.calls.append(operation)
        fault = self.script.get(operation, []).pop(0) if self.script.get(operation) else "ok"
        if fault == "reset":
            raise ConnectionResetError("scripted: reset before the request")
        if fault == "denied":
            raise Denied("scripted: denied")
        yield fault
        if fault == "lost":
            raise ConnectionResetError("scripted: the answer was lost")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        with self._fault("pipe_file"):
            super().pipe_file(path, value, mode=mode, **kwargs)

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        with self._fault("put_file") as fault:
            data = Path(lpath).read_bytes()
            super().pipe_file(rpath, data[: len(data) // 2] if fault == "cut" else data)

    def cat_file(self, path: str, **kwargs: Any) -> bytes:
        with self._fault("cat_file"):
            return bytes(super().cat_file(path, **kwargs))


def install() -> type[FlakyFileSystem]:
    """Register the store, empty and without faults."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.store.clear()
    FlakyFileSystem.pseudo_dirs[:] = [""]
    FlakyFileSystem.script.clear()
    FlakyFileSystem.calls.clear()
    return FlakyFileSystem
