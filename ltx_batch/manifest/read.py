"""Manifest: the files behind a URI, as shards of consecutive rows."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ltx_batch.errors import ManifestError, RowIssue
from ltx_batch.manifest.sources import SOURCES, Options, Source, open_source, suffix
from ltx_batch.storage import FileRef, expand, sha256_uri

_SUFFIXES = tuple(f".{name}" for name in SOURCES)


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive rows of one row group. `offset` is the first row within its file.

    The name is `<file>-<row group>-<first row in the group>` and stays the same for the same files and shard size.
    """

    name: str
    file: int
    offset: int
    rows: int
    row_group: int


class Manifest:
    """An open manifest. Holds no rows but those of the row group that was read last."""

    def __init__(self, uri: str, files: Sequence[FileRef], sources: Sequence[Source], options: Options) -> None:
        self.uri = uri
        self.files = tuple(files)
        self.options = options
        self.rows = sum(sum(source.groups) for source in sources)
        self._sources = tuple(sources)
        self._lock = threading.Lock()
        self._group: tuple[tuple[Any, ...], pa.Table] | None = None

    @classmethod
    def open(cls, uri: str, *, options: Options = None) -> Manifest:
        """Open a file, folder or glob at any fsspec URI: Parquet, CSV or JSONL, one format only.

        Parquet costs its footers; the rows of CSV and JSONL must be counted. Raises ManifestError naming every file
        that cannot be read or has wrong columns.
        """
        try:
            files = expand(uri, suffixes=_SUFFIXES, options=options)
        except FileNotFoundError as error:
            raise _refused(uri, f"there is no manifest: {error}") from None
        _one_format(uri, files)
        manifest = cls(uri, files, _open_all(files, options), options)
        if manifest.rows == 0:
            raise _refused(uri, "has no rows")
        return manifest

    def header(self, file: int) -> Sequence[str]:
        """A file's column names; of JSONL, the keys of its first rows."""
        return self._sources[file].header

    def fingerprint(self) -> list[dict[str, Any]]:
        """What names the manifest: each file's `uri`, `size`, `sha256` and `rows`."""
        return [
            {"uri": ref.uri, "size": ref.size, "sha256": sha256_uri(ref, self.options), "rows": sum(source.groups)}
            for ref, source in zip(self.files, self._sources, strict=True)
        ]

    def shards(self, shard_rows: int) -> Iterator[Shard]:
        """All shards in order, none longer than `shard_rows` and none across row groups."""
        for file, source in enumerate(self._sources):
            offset = 0
            for group, rows in enumerate(source.groups):
                for first in range(0, rows, shard_rows):
                    name = f"{file:05d}-{group:05d}-{first:06d}"
                    yield Shard(name, file, offset + first, min(shard_rows, rows - first), group)
                offset += rows

    def read(self, shard: Shard, *, columns: Sequence[str] | None = None) -> pa.Table:
        """A shard's rows with the types of the file; `columns` that the file lacks are left out."""
        source = self._sources[shard.file]
        first = shard.offset - sum(source.groups[: shard.row_group])
        wanted = (shard.file, shard.row_group, tuple(columns) if columns is not None else None)
        with self._lock:
            if self._group is None or self._group[0] != wanted:
                self._group = None  # let the old one go before the new one comes
                self._group = (wanted, source.read(shard.row_group, columns))
            return self._group[1].slice(first, shard.rows)


def _one_format(uri: str, files: Sequence[FileRef]) -> None:
    formats = sorted({suffix(ref.uri) for ref in files})
    unknown = [name for name in formats if name not in SOURCES]
    if unknown:
        raise _refused(uri, f"must end in {', '.join(_SUFFIXES)}; ends in .{unknown[0]}")
    if len(formats) > 1:
        found = " and ".join(formats)
        raise _refused(uri, f"mixes {found} files; a manifest has one format, so name one kind: {uri}/*.{formats[0]}")


def _open_all(files: Sequence[FileRef], options: Options) -> list[Source]:
    sources: list[Source] = []
    issues: list[RowIssue] = []
    for ref in files:
        try:
            sources.append(open_source(ref, options))
        except ManifestError as error:
            issues += error.issues
    if issues:
        raise ManifestError(issues)
    return sources


def _refused(uri: str, rule: str) -> ManifestError:
    return ManifestError([RowIssue(uri, None, None, None, None, rule)])
