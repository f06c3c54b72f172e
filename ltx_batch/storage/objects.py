"""A prefix in an object store. A single request creates an object, so nothing is ever seen half-written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ltx_batch.storage.connect import filesystem, patiently, scheme, strip

# s3fs else asks for the size before it reads, and lists where there is no object: three requests for a missing record.
_READ_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 1}, "s3a": {"max_concurrency": 1}}


class ObjectPrefix:
    """Never `fs.open(..., "wb")`: fsspec commits what was written so far when an exception leaves the block."""

    def __init__(self, uri: str, options: Mapping[str, Any], *, single_writer: bool) -> None:
        self.uri = uri
        self.options = dict(options)
        self.single_writer = single_writer

    def path(self, name: str) -> str:
        return f"{self.uri}/{name}" if name else self.uri

    def read(self, name: str) -> bytes:
        options = _READ_OPTIONS.get(scheme(self.uri), {})
        return patiently(self.path(name), lambda: bytes(self._fs.cat_file(self.path(name), **options)))

    def create(self, name: str, data: bytes) -> bool:
        if self.single_writer and self.exists(name):  # the store may not say so, and nobody else writes in between
            return False
        try:
            patiently(self.path(name), lambda: self._fs.pipe_file(self.path(name), data, mode="create"))
        except FileExistsError:
            return False
        return True

    def replace(self, name: str, data: bytes) -> None:
        patiently(self.path(name), lambda: self._fs.pipe_file(self.path(name), data))

    def upload(self, source: Path, name: str) -> None:
        patiently(self.path(name), lambda: self._put(source, self.path(name)))

    def _put(self, source: Path, path: str) -> None:
        self._fs.put_file(str(source), path)
        arrived, sent = self._fs.info(path)["size"], source.stat().st_size
        if arrived != sent:  # a ConnectionError, because another try is the cure
            raise ConnectionError(f"{path}: {arrived} of {sent} bytes arrived")

    def download(self, name: str, target: Path) -> None:
        get(self.path(name), target, self.options)

    def exists(self, name: str) -> bool:
        try:  # not fsspec's isfile: it calls every fault "absent"
            found = patiently(self.path(name), lambda: self._fs.info(self.path(name)))
        except FileNotFoundError:
            return False
        return bool(found["type"] == "file")

    def folders(self, prefix: str) -> list[str]:
        try:
            found = patiently(self.path(prefix), lambda: self._fs.ls(self.path(prefix), detail=True))
        except FileNotFoundError:
            return []
        return [entry["name"].rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "directory"]

    def list(self, prefix: str) -> list[str]:
        try:
            found = patiently(self.path(prefix), lambda: self._fs.find(self.path(prefix)))
        except FileNotFoundError:
            return []
        root = len(strip(self.uri, self.options).rstrip("/")) + 1
        return [name[root:] for name in found]

    def delete(self, name: str) -> None:
        with suppress(FileNotFoundError):
            patiently(self.path(name), lambda: self._fs.rm_file(self.path(name)))

    @property
    def _fs(self) -> Any:
        return filesystem(self.uri, self.options)


def get(uri: str, target: Path, options: Mapping[str, Any] | None) -> None:
    """Fetch an object into a local file, which appears whole or not at all."""
    partial = target.with_name(f"{target.name}.part")
    try:
        patiently(uri, lambda: filesystem(uri, options).get_file(uri, str(partial)))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
