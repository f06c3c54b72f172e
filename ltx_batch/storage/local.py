"""A folder on a local or mounted disk, with writes that are whole or absent."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from ltx_batch.errors import StorageRefused
from ltx_batch.storage.connect import scheme

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_NO_CREATE = (
    "the disk under {} has no hard links, without which no write there is create-only; use another output, or set "
    "storage.single_writer: true and make sure that only one driver ever writes there"
)


def local_path(uri: str) -> Path:
    """The absolute path of a local path or `file://` URI."""
    if scheme(uri) != "file":
        raise ValueError(f"{uri} is not local")
    return Path(uri.partition("://")[2] if "://" in uri else uri).expanduser().absolute()


class LocalFolder:
    """Every write goes to a temporary in the same folder, is flushed to the disk, and appears under its name at once.

    The folder entry itself is not flushed: a machine that loses power may lose the last moments, in order, and a
    journaling filesystem never shows a later file without an earlier one.
    """

    def __init__(self, root: Path, *, single_writer: bool) -> None:
        self.root = root
        self.single_writer = single_writer

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)  # noqa: PTH118 - some 20 times faster than pathlib, once per file

    def read(self, name: str) -> bytes:
        with open(self.path(name), "rb") as file:  # noqa: PTH123
            return file.read()

    def create(self, name: str, data: bytes) -> bool:
        target = self.path(name)
        with _temporary(target) as temporary:
            _write(temporary, data)
            return self._link(temporary, target)

    def replace(self, name: str, data: bytes) -> None:
        target = self.path(name)
        with _temporary(target) as temporary:
            _write(temporary, data)
            os.replace(temporary, target)  # noqa: PTH105

    def upload(self, source: Path, name: str) -> None:
        target = self.path(name)
        with _temporary(target) as temporary:
            shutil.copyfile(source, temporary)
            _flush(temporary)
            if os.stat(temporary).st_size != source.stat().st_size:  # noqa: PTH116
                raise OSError(f"{source} changed while it was copied to {target}")
            os.replace(temporary, target)  # noqa: PTH105

    def download(self, name: str, target: Path) -> None:
        shutil.copyfile(self.path(name), target)

    def exists(self, name: str) -> bool:
        return os.path.isfile(self.path(name))  # noqa: PTH113

    def folders(self, prefix: str) -> list[str]:
        try:
            return [entry.name for entry in os.scandir(self.path(prefix)) if entry.is_dir()]
        except FileNotFoundError:
            return []

    def list(self, prefix: str) -> list[str]:
        names = []
        for folder, _, files in os.walk(self.path(prefix)):
            names += [os.path.relpath(os.path.join(folder, file), self.root) for file in files]  # noqa: PTH118
        return names

    def delete(self, name: str) -> None:
        Path(self.path(name)).unlink(missing_ok=True)

    def _link(self, temporary: str, target: str) -> bool:
        """A hard link fails where the name is taken: the one local operation that is create-only and atomic."""
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if not self.single_writer:
                raise StorageRefused(_NO_CREATE.format(self.root)) from error
            if os.path.exists(target):  # noqa: PTH110
                return False
            os.replace(temporary, target)  # noqa: PTH105
        return True


@contextmanager
def _temporary(target: str) -> Iterator[str]:
    """A fresh empty file beside `target`, gone afterwards unless it was renamed."""
    path = f"{target}.{uuid4().hex[:12]}.tmp"
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    try:
        os.close(os.open(path, flags, 0o666))
    except FileNotFoundError:
        os.makedirs(os.path.dirname(target), exist_ok=True)  # noqa: PTH103, PTH120
        os.close(os.open(path, flags, 0o666))
    try:
        yield path
    finally:
        Path(path).unlink(missing_ok=True)


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _flush(path: str) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
