"""A manifest written anew, as one file of its own format, with other prompts."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ltx_batch.errors import JobError
from ltx_batch.manifest.read import Manifest, Shard

ORIGINAL = "original_prompt"
_GROUP_ROWS = 8192
Prompts = Callable[[Shard], Sequence[str | None]]


def rewrite(manifest: Manifest, shard_rows: int, prompts: Prompts, target: Path) -> None:
    """Write `manifest` to the local file `target`: every column as it was, but a prompt replaced where `prompts` gives one
    for a row, and what it was before in `original_prompt` (null where it is as it was).

    Raises JobError where Parquet files of one manifest hold one column in types that do not go together.
    """
    tables = (_replaced(manifest.read(shard), prompts(shard)) for shard in manifest.shards(shard_rows))
    write = {".parquet": _write_parquet, ".csv": _write_csv, ".jsonl": _write_jsonl}[target.suffix.lower()]
    write(manifest, tables, target)


def _replaced(table: pa.Table, prompts: Sequence[str | None]) -> pa.Table:
    before = table.column("prompt").to_pylist()
    pairs = list(zip(before, prompts, strict=True))
    after = pa.array([old if new is None else new for old, new in pairs], pa.string())
    original = pa.array([None if new is None else old for old, new in pairs], pa.string())
    replaced = table.set_column(table.schema.get_field_index("prompt"), "prompt", after)
    return replaced.append_column(ORIGINAL, original)


def _write_parquet(manifest: Manifest, tables: Iterator[pa.Table], target: Path) -> None:
    schema = _schema(manifest)
    with pq.ParquetWriter(target, schema, compression="zstd") as writer:
        for group in _groups(tables):
            whole = pa.concat_tables([schema.empty_table(), *group], promote_options="permissive")
            writer.write_table(whole.select(schema.names).cast(schema))


def _schema(manifest: Manifest) -> pa.Schema:
    """The columns of all files."""
    first = {shard.file: shard for shard in reversed(list(manifest.shards(_GROUP_ROWS)))}
    found = [_replaced(table, [None] * len(table)).schema for table in map(manifest.read, first.values())]
    try:
        return pa.unify_schemas([schema.remove_metadata() for schema in found], promote_options="permissive")
    except pa.ArrowException as error:
        raise JobError(f"the files of {manifest.uri} do not go together, enhance them one by one: {error}") from None


def _groups(tables: Iterator[pa.Table]) -> Iterator[list[pa.Table]]:
    """Tables together, so that no row group is small."""
    group: list[pa.Table] = []
    for table in tables:
        group.append(table)
        if sum(map(len, group)) >= _GROUP_ROWS:
            yield group
            group = []
    if group:
        yield group


def _write_csv(manifest: Manifest, tables: Iterator[pa.Table], target: Path) -> None:
    names = dict.fromkeys(name for file in range(len(manifest.files)) for name in manifest.header(file))
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*names, ORIGINAL])
        writer.writeheader()
        for table in tables:
            writer.writerows(table.to_pylist())


def _write_jsonl(manifest: Manifest, tables: Iterator[pa.Table], target: Path) -> None:
    with target.open("w", encoding="utf-8") as file:
        for table in tables:
            texts = {field.name for field in table.schema if isinstance(field.type, pa.JsonType)}
            for row in table.to_pylist():
                file.write(json.dumps(_plain(row, texts), ensure_ascii=False) + "\n")


def _plain(row: dict[str, Any], json_texts: set[str]) -> dict[str, Any]:
    """A row without its nulls; a column whose values disagree was held as JSON text."""
    there = {name: value for name, value in row.items() if value is not None}
    return {name: json.loads(value) if name in json_texts else value for name, value in there.items()}
