"""From a shard's table to render requests."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ltx_batch.errors import RowIssue
from ltx_batch.job import RowDefaults
from ltx_batch.manifest.cells import Cells, Fault
from ltx_batch.manifest.loras import NAME, loras_of
from ltx_batch.manifest.read import Manifest, Shard
from ltx_batch.manifest.rules import check
from ltx_batch.request import Condition, LoraRef, RenderRequest
from ltx_batch.storage import join_uri

_MAX_VALUE_CHARS = 200  # of a value in an issue: a prompt may be a page long


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a manifest: a request, or the issues that keep it from being one. `row` counts from 0 in `file`."""

    file: str
    row: int
    row_id: str | None
    request: RenderRequest | None
    issues: tuple[RowIssue, ...] = ()
    priority: int = 0


def resolve_rows(
    table: pa.Table,
    *,
    manifest: Manifest,
    shard: Shard,
    defaults: RowDefaults,
    loras: Sequence[LoraRef] = (),
) -> list[Row]:
    """The rows of a shard's table in order, with every default resolved; `loras` is what a row without its own gets.

    A row that breaks rules has no request and all its issues. No file is opened: media are full URIs, their hash is
    the manifest's or None. Which rows repeat a `row_id`, and which media are missing, is for `validate` to find.
    """
    file = manifest.files[shard.file].uri
    cells, faults = check(table, defaults)
    issues = defaultdict(list)
    for fault, issue in zip(faults, issues_of(table, cells, faults, file=file, offset=shard.offset), strict=True):
        issues[fault.row].append(issue)
    columns = {name: array.to_pylist() for name, array in cells.arrays.items()}
    rows = []
    for index in range(table.num_rows):
        values = {name: column[index] for name, column in columns.items() if column[index] is not None}
        broken = tuple(issues[index])
        request = None if broken else request_of(values, folder_of(file), defaults, tuple(loras))
        place, row_id = shard.offset + index, values.get("row_id")
        rows.append(Row(file, place, row_id, request, broken, values.get("priority", 0)))
    return rows


def issues_of(table: pa.Table, cells: Cells, faults: list[Fault], *, file: str, offset: int) -> Iterator[RowIssue]:
    """Faults with their place in the manifest, and the value as it stands there."""
    row_ids = cells.array("row_id")
    for fault in faults:
        value = None if fault.column is None else _shown(_value(table, cells, fault.column, fault.row))
        row_id = row_ids[fault.row].as_py()
        yield RowIssue(file, offset + fault.row, row_id, fault.column, value, fault.rule)


def _value(table: pa.Table, cells: Cells, name: str, row: int) -> Any:
    """The value as the contract reads it, else as it stands in the file."""
    value = cells.array(name)[row].as_py()
    if value is not None or name not in table.column_names:
        return value
    stored = table.column(name)
    raw = stored[row].as_py()
    is_json = isinstance(stored.type, pa.JsonType) and raw is not None
    return json.loads(raw) if is_json else raw


def seed_of(row_id: str) -> int:
    """The seed of a row that has a `row_id` and no seed: the first 4 bytes of the id's sha256, big-endian.

    32 bits, so that the official script takes it as well (it seeds NumPy, which takes no more).
    """
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:4], "big")


def folder_of(file: str) -> str:
    """The folder that relative media paths of a manifest file start from."""
    folder, slash, _ = file.rpartition("/")
    return folder or slash or "."


def request_of(
    values: Mapping[str, Any], folder: str, defaults: RowDefaults, loras: tuple[LoraRef, ...]
) -> RenderRequest:
    """The request of a row that breaks no rule; `values` by column, relative paths from `folder`, `loras` for a row without
    its own."""
    fields = defaults.fill(values)
    if "seed" not in values and "row_id" in values:
        fields["seed"] = seed_of(values["row_id"])
    if fields["timesteps"] is not None:
        fields["timesteps"] = tuple(fields["timesteps"])
    begin = values.get("input_media_path")
    fields["input_media"] = None if begin is None else Condition(join_uri(folder, begin))
    if NAME in values:  # an empty list means none
        loras = loras_of(values[NAME], folder)
    return RenderRequest(prompt=values["prompt"], conditions=_conditions(values, folder), loras=loras, **fields)


def _conditions(values: Mapping[str, Any], folder: str) -> tuple[Condition, ...]:
    media = values.get("conditioning_media_paths") or []
    strengths = values.get("conditioning_strengths") or [1.0] * len(media)
    hashes = values.get("conditioning_media_sha256") or [None] * len(media)
    frames = values.get("conditioning_start_frames") or []
    return tuple(
        Condition(join_uri(folder, path), start_frame=frame, strength=strength, media_sha256=sha256)
        for path, frame, strength, sha256 in zip(media, frames, strengths, hashes, strict=True)
    )


def _shown(value: Any) -> Any:
    """A value that fits an error message and JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_shown(entry) for entry in value]
    if isinstance(value, str) and len(value) > _MAX_VALUE_CHARS:
        return value[:_MAX_VALUE_CHARS] + "…"
    return value
