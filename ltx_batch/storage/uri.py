"""URIs outside the output prefix: manifests, media, checkpoints."""

from __future__ import annotations

import glob
import io
import os
import posixpath
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ltx_batch.storage.connect import filesystem, patiently, scheme, strip
from ltx_batch.storage.local import local_path
from ltx_batch.storage.objects import get

Options = Mapping[str, Any] | None

_BLOCK_BYTES = 8 * 2**20  # s3fs reads 50 MiB ahead by default; a Parquet footer needs none of it
_FINGERPRINTS = ("ETag", "etag", "xet_hash", "blob_id", "md5Hash", "LastModified", "last_modified", "updated", "mtime")


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file as it was found. `size` in bytes (-1: the server does not say). `fingerprint` changes when the file does: an
    etag, or a local file's times; empty where the server has neither."""

    uri: str
    size: int
    fingerprint: str


def is_local_uri(uri: str) -> bool:
    return scheme(uri) == "file"


def is_relative(uri: str) -> bool:
    """Whether `uri` means something only from a certain working directory."""
    return is_local_uri(uri) and "://" not in uri and not uri.startswith("~") and not os.path.isabs(uri)  # noqa: PTH117


def join_uri(base: str, relative: str) -> str:
    """`relative` seen from the folder `base`; absolute paths and URIs stay as they are."""
    if not is_relative(relative):
        return relative
    if is_local_uri(base):
        return os.path.normpath(local_path(base) / relative)
    root, separator, folder = base.partition("://")
    return root + separator + posixpath.normpath(f"{folder}/{relative}")


def expand(uri: str, *, suffixes: tuple[str, ...], options: Options = None) -> list[FileRef]:
    """The files that `uri` names: one file (of any suffix), or those with one of `suffixes` in a folder or glob, sorted.

    A folder is not descended into, and names that begin with `.` or `_` are left out. Raises FileNotFoundError.
    """
    if exists_uri(uri, options):
        return [stat_uri(uri, options)]
    found = _local_matches(uri) if is_local_uri(uri) else _remote_matches(uri, options)
    files = [ref for ref in found if ref.uri.lower().endswith(suffixes) and _plain(ref.uri)]
    if not files:
        wanted = " or ".join(suffixes)
        raise FileNotFoundError(f"{uri}: neither a file, nor a folder or glob with a file that ends in {wanted}")
    return sorted(files, key=lambda ref: ref.uri)


def stat_uri(uri: str, options: Options = None) -> FileRef:
    """Raises FileNotFoundError."""
    if is_local_uri(uri):
        path = local_path(uri)
        stat = path.stat()
        return FileRef(str(path), stat.st_size, f"{stat.st_mtime_ns}.{stat.st_ctime_ns}")
    return _ref(uri, _info(uri, options))


def _ref(uri: str, info: Mapping[str, Any]) -> FileRef:
    mark = next((str(info[name]) for name in _FINGERPRINTS if info.get(name)), "")
    size = info.get("size")
    return FileRef(uri, -1 if size is None else size, mark)


def exists_uri(uri: str, options: Options = None) -> bool:
    """Whether `uri` is a file. Raises what the store says when it cannot tell (no credentials, denied)."""
    if is_local_uri(uri):
        return local_path(uri).is_file()
    try:
        return bool(_info(uri, options)["type"] == "file")
    except FileNotFoundError:
        return False


def read_uri(uri: str, options: Options = None) -> bytes:
    """Raises FileNotFoundError."""
    if is_local_uri(uri):
        return local_path(uri).read_bytes()
    return patiently(uri, lambda: bytes(filesystem(uri, options).cat_file(uri)))


@contextmanager
def open_uri(uri: str, options: Options = None) -> Iterator[BinaryIO]:
    """A seekable file. Raises FileNotFoundError."""
    if is_local_uri(uri):
        with local_path(uri).open("rb") as file:
            yield file
        return
    if scheme(uri) in ("http", "https") and not _info(uri, options).get("partial"):  # a server that cannot give ranges
        yield io.BytesIO(read_uri(uri, options))
        return
    with patiently(uri, lambda: filesystem(uri, options).open(uri, "rb", block_size=_BLOCK_BYTES)) as file:
        yield file


def fetch_uri(uri: str, target: Path, options: Options = None) -> None:
    """Copy a file to the local path `target`. Raises FileNotFoundError."""
    if is_local_uri(uri):
        shutil.copyfile(local_path(uri), target)
    else:
        get(uri, target, options)


def _info(uri: str, options: Options) -> dict[str, Any]:
    return dict(patiently(uri, lambda: filesystem(uri, options).info(uri)))


def _local_matches(uri: str) -> list[FileRef]:
    path = local_path(uri)
    found = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path)))  # noqa: PTH207 - an absolute pattern
    return [stat_uri(str(file)) for file in found if file.is_file()]


def _remote_matches(uri: str, options: Options) -> list[FileRef]:
    """Sizes and fingerprints come with the listing: no request per file."""
    if scheme(uri) in ("http", "https"):
        return []
    files = filesystem(uri, options)
    if any(mark in uri for mark in "*?["):
        found = list(patiently(uri, lambda: files.glob(uri, detail=True)).values())
    else:
        try:
            found = patiently(uri, lambda: files.ls(strip(uri, options), detail=True))
        except FileNotFoundError:
            return []
    return [_ref(files.unstrip_protocol(info["name"]), info) for info in found if info["type"] == "file"]


def _plain(name: str) -> bool:
    return not posixpath.basename(name).startswith((".", "_"))
