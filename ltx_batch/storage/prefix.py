"""Storage: everything below one output prefix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from ltx_batch.errors import StorageRefused
from ltx_batch.storage.connect import scheme
from ltx_batch.storage.local import LocalFolder, local_path
from ltx_batch.storage.objects import ObjectPrefix


class Storage:
    """Files below `uri`, by names such as `runs/ab/run.json`. Thread-safe, picklable, holds no connection.

    `options` are fsspec's for that store (`endpoint_url`, `anon`, ...). `single_writer` accepts a store that cannot do
    create-only writes; then only one process may write. A local `uri` is made absolute.
    """

    def __init__(self, uri: str, *, options: Mapping[str, Any] | None = None, single_writer: bool = False) -> None:
        self.is_local = scheme(uri) == "file"
        self.uri = str(local_path(uri)) if self.is_local else uri.rstrip("/")
        self.options = dict(options or {})
        self.single_writer = single_writer
        self._files: LocalFolder | ObjectPrefix = (
            LocalFolder(Path(self.uri), single_writer=single_writer)
            if self.is_local
            else ObjectPrefix(self.uri, self.options, single_writer=single_writer)
        )

    def __repr__(self) -> str:
        return f"Storage({self.uri!r})"

    def path(self, name: str) -> str:
        """The full URI, or local path, of a name below the prefix."""
        return self._files.path(name)

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        return self._files.read(name)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file that is not there yet; False, and nothing written, where it is.

        An object store may repeat a request whose answer was lost and then find its own file: whoever must tell that
        from a lost race reads the file back.
        """
        return self._files.create(name, data)

    def replace(self, name: str, data: bytes) -> None:
        """Write a file, over an older one if need be; readers see the old or the new one whole."""
        self._files.replace(name, data)

    def upload(self, source: Path, name: str) -> None:
        """Copy a local file to `name` in one piece; the size that arrived is checked, and passing faults are retried."""
        self._files.upload(source, name)

    def download(self, name: str, target: Path) -> None:
        """Copy `name` to a local file. Raises FileNotFoundError."""
        self._files.download(name, target)

    def exists(self, name: str) -> bool:
        return self._files.exists(name)

    def folders(self, prefix: str) -> list[str]:
        """Sorted names of the folders directly in `prefix`, without descending into them."""
        return sorted(self._files.folders(prefix))

    def list(self, prefix: str) -> list[str]:
        """Sorted names of all files below the folder `prefix`, however deep, in one flat listing; [] where it is absent.

        Temporaries that a killed writer left behind do not count.
        """
        return sorted(name for name in self._files.list(prefix) if not name.endswith(".tmp"))

    def delete(self, name: str) -> None:
        """Remove a file; one that is not there is removed already."""
        self._files.delete(name)

    def probe(self) -> None:
        """Try the promises once. Raises StorageRefused where the prefix cannot be written or create-only is ignored."""
        name = f".probe-{uuid4().hex}.tmp"
        try:
            created = self.create(name, b"first")
            again = self.create(name, b"second")
            found = self.read(name)
            self.delete(name)
        except StorageRefused:
            raise
        except Exception as error:
            raise StorageRefused(f"the output {self.uri} cannot be used: {_reason(error)}") from error
        if not created or again or found != b"first":
            raise StorageRefused(
                f"{self.uri} ignores create-only writes, so two writers could both win a row; use another store, or "
                "set storage.single_writer: true and make sure that only one driver ever writes there"
            )


def _reason(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"{error}; grant reading, writing, listing and deleting there (without s3:ListBucket a missing file reads as denied)"
    if isinstance(error, FileNotFoundError):
        return f"{error}; create the bucket, or mend the name"
    if isinstance(error, NotADirectoryError):
        return f"{error}; a file lies where a folder must be: give another --output"
    return f"{type(error).__name__}: {error}"
