"""Manifest files of the three formats, each read by row group.

A CSV or JSONL file has no row groups of its own: its rows are cut into groups of `TEXT_GROUP_ROWS`, whose byte ranges
are noted in one pass over the file when it is opened, so that any of them can be read without those before it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_batch.errors import ManifestError, RowIssue
from ltx_batch.manifest.columns import COLUMNS, RESERVED, UNREADABLE, accepts, check_names, check_types
from ltx_batch.storage import FileRef, open_uri

TEXT_GROUP_ROWS = 8192
_BUFFER_BYTES = 1 << 20
Options = Mapping[str, Any] | None


class Source(Protocol):
    """One file of a manifest. `groups` counts the rows of each row group; `read` gives one group as it is stored."""

    @property
    def header(self) -> Sequence[str]: ...
    @property
    def groups(self) -> Sequence[int]: ...
    def read(self, group: int, columns: Sequence[str] | None = None) -> pa.Table: ...


def open_source(ref: FileRef, options: Options) -> Source:
    """Read what is needed to know a file's rows. Raises ManifestError where it cannot be read or its columns are wrong."""
    try:
        return SOURCES[suffix(ref.uri)](ref, options)
    except (pa.ArrowException, OSError, csv.Error, UnicodeDecodeError) as error:
        raise ManifestError([RowIssue(ref.uri, None, None, None, None, f"cannot be read: {error}")]) from error


def suffix(uri: str) -> str:
    """`csv` of `s3://bucket/rows.csv?versionId=1`."""
    path = uri.partition("?")[0] if "://" in uri else uri
    return path.rpartition(".")[2].lower()


@dataclass(frozen=True)
class ParquetSource:
    ref: FileRef
    options: Options
    metadata: pq.FileMetaData
    header: Sequence[str]
    groups: Sequence[int]

    @classmethod
    def open(cls, ref: FileRef, options: Options) -> ParquetSource:
        with open_uri(ref.uri, options=options) as handle:
            metadata = pq.read_metadata(handle)
        schema = metadata.schema.to_arrow_schema()
        _refuse(check_names(ref.uri, schema.names) + check_types(ref.uri, schema))
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        return cls(ref, options, metadata, schema.names, rows)

    def read(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        with open_uri(self.ref.uri, options=self.options) as handle:
            # The footer is at hand, and one group is small: threads would only take cores from the workers.
            file = pq.ParquetFile(handle, metadata=self.metadata)
            return file.read_row_group(group, columns=columns, use_threads=False)


@dataclass(frozen=True)
class CsvSource:
    """CSV with a header, UTF-8. Every column is text; an empty cell is null."""

    ref: FileRef
    options: Options
    header: Sequence[str]
    groups: Sequence[int]
    starts: Sequence[int]  # byte offsets of the groups, and the file's end

    @classmethod
    def open(cls, ref: FileRef, options: Options) -> CsvSource:
        with open_uri(ref.uri, options=options) as handle:
            lines = _Lines(handle)
            records = _csv_records(lines)
            header = next(records, [])
            if isinstance(header, _Unreadable):
                raise csv.Error(f"the header {header.reason}")
            _refuse(check_names(ref.uri, header))
            groups, starts = _cut(records, lines)
        return cls(ref, options, header, groups, starts)

    def read(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        records = list(_csv_records(_Lines(_range(self, group))))
        faults = [self._fault(record) for record in records]
        names = [name for name in self.header if columns is None or name in columns]
        arrays = {name: self._column(name, records, faults) for name in names}
        return _with_faults(pa.table(arrays, pa.schema([(name, pa.string()) for name in names])), faults)

    def _fault(self, record: list[str] | _Unreadable) -> str | None:
        if isinstance(record, _Unreadable):
            return record.reason
        if len(record) == len(self.header):
            return None
        return f"has {len(record)} cells where the header has {len(self.header)}: quote cells that hold a comma"

    def _column(self, name: str, records: Sequence[Any], faults: Sequence[str | None]) -> list[str | None]:
        place = self.header.index(name)
        return [record[place] or None if fault is None else None for record, fault in zip(records, faults, strict=True)]


@dataclass(frozen=True)
class JsonlSource:
    """One JSON object a line, UTF-8; blank lines are no rows. Types are found for each row group by itself.

    `header` holds the keys of the first group. A column whose values disagree, or do not fit the contract, is held as JSON text (Arrow's `arrow.json` type), so
    that each wrong cell can be named.
    """

    ref: FileRef
    options: Options
    header: Sequence[str]
    groups: Sequence[int]
    starts: Sequence[int]

    @classmethod
    def open(cls, ref: FileRef, options: Options) -> JsonlSource:
        with open_uri(ref.uri, options=options) as handle:
            lines = _Lines(handle)
            groups, starts = _cut((line for line in lines if line.strip()), lines)
        source = cls(ref, options, (), groups, starts)
        return replace(source, header=source.read(0).column_names) if groups else source

    def read(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        parsed = [_json_object(line) for line in _Lines(_range(self, group)) if line.strip()]
        objects = [{} if isinstance(row, _Unreadable) else row for row in parsed]
        faults = [row.reason if isinstance(row, _Unreadable) else None for row in parsed]
        names = dict.fromkeys(name for row in objects for name in row)
        wanted = [name for name in names if columns is None or name in columns]
        arrays = {name: _json_column(name, [row.get(name) for row in objects]) for name in wanted}
        if not arrays:  # a table without columns would have no rows
            arrays = {"prompt": pa.nulls(len(objects), pa.string())}
        return _with_faults(pa.table(arrays), faults)


SOURCES: Mapping[str, Callable[[FileRef, Options], Source]] = {
    "parquet": ParquetSource.open,
    "csv": CsvSource.open,
    "jsonl": JsonlSource.open,
}


@dataclass(frozen=True, slots=True)
class _Unreadable:
    reason: str


class _Lines:
    """Lines of a binary stream; `offset` is the byte behind the last one that was taken."""

    def __init__(self, handle: Any) -> None:
        self._lines = io.BufferedReader(handle, _BUFFER_BYTES)
        self.offset = 0

    def __iter__(self) -> Iterator[bytes]:
        for line in self._lines:
            self.offset += len(line)
            yield line


def _cut(records: Iterable[object], lines: _Lines) -> tuple[list[int], list[int]]:
    """Rows of each group and the groups' byte offsets. `lines` must be what `records` draws from."""
    groups, starts, rows = [], [lines.offset], 0
    for rows, _ in enumerate(records, 1):
        if rows % TEXT_GROUP_ROWS == 0:
            groups.append(TEXT_GROUP_ROWS)
            starts.append(lines.offset)
    if rows % TEXT_GROUP_ROWS:
        groups.append(rows % TEXT_GROUP_ROWS)
        starts.append(lines.offset)
    return groups, starts


def _range(source: CsvSource | JsonlSource, group: int) -> BinaryIO:
    start, end = source.starts[group : group + 2]
    with open_uri(source.ref.uri, options=source.options) as handle:
        handle.seek(start)
        return io.BytesIO(handle.read(end - start))


def _csv_records(lines: _Lines) -> Iterator[list[str] | _Unreadable]:
    """Rows of a CSV file, blank lines left out. The csv module, as it says which row is at fault and goes on."""
    decoded = _Decoded(lines)
    reader = csv.reader(decoded, strict=True)
    while True:
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Unreadable(f"is not CSV: {error}")
            continue
        if decoded.take_fault():
            yield _Unreadable("is not UTF-8")
        elif record:
            yield record


class _Decoded:
    """Text of lines; a line that is not UTF-8 is remembered until its row has been named."""

    def __init__(self, lines: _Lines) -> None:
        self._lines, self._fault, self._first = iter(lines), False, True

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        encoding, self._first = ("utf-8-sig" if self._first else "utf-8"), False
        try:
            return line.decode(encoding)
        except UnicodeDecodeError:
            self._fault = True
            return line.decode(encoding, errors="replace")

    def take_fault(self) -> bool:
        fault, self._fault = self._fault, False
        return fault


def _json_object(line: bytes) -> dict[str, Any] | _Unreadable:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        return _Unreadable(f"is not JSON: {error}")
    if not isinstance(row, dict):
        return _Unreadable("is not a JSON object with the columns as keys")
    reserved = [name for name in row if name.startswith(RESERVED)]
    if reserved:
        return _Unreadable(f"has the key {reserved[0]}; names that begin with {RESERVED} are the output's own")
    return row


def _json_column(name: str, values: list[Any]) -> pa.Array:
    try:
        array = pa.array(values)
    except (pa.ArrowException, OverflowError, TypeError):
        return _as_json(values)
    fits: Callable[[pa.DataType], bool] = (
        (lambda kind: accepts(COLUMNS[name], kind)) if name in COLUMNS else (lambda kind: "struct" not in str(kind))
    )
    return array if fits(array.type) else _as_json(values)


def _as_json(values: list[Any]) -> pa.Array:
    texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


def _with_faults(table: pa.Table, faults: Sequence[str | None]) -> pa.Table:
    if not any(faults):
        return table
    return table.append_column(UNREADABLE, pa.array(faults, pa.string()))


def _refuse(issues: list[RowIssue]) -> None:
    if issues:
        raise ManifestError(issues)
