"""Books of open shards: which rows wait for which key, and the table that is written when a shard's last row ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from ltx_batch.manifest import Row, Shard
from ltx_batch.record import RenderRecord

_COLUMNS = pa.schema(
    [
        ("ltx_row", pa.int64()),
        ("ltx_status", pa.string()),
        ("ltx_key", pa.string()),
        ("ltx_video", pa.string()),
        ("ltx_sha256", pa.string()),
        ("ltx_bytes", pa.int64()),
        ("ltx_frames_sha256", pa.string()),
        ("ltx_seed", pa.int64()),
        ("ltx_error_class", pa.string()),
        ("ltx_error", pa.string()),
        ("ltx_attempts", pa.int64()),
        ("ltx_render_seconds", pa.float64()),
        ("ltx_gpu_seconds", pa.float64()),
        ("ltx_reused", pa.bool_()),
        ("ltx_degraded", pa.bool_()),
        ("ltx_worker", pa.string()),
        ("ltx_device", pa.string()),
        ("ltx_finished_at", pa.string()),
    ]
)


def line(row: int, record: RenderRecord, seed: int | None = None) -> dict[str, Any]:
    """The `ltx_` columns of one row. A failed row that never got a key has none. `seed` is the row's own, which records of
    earlier versions and of deaths do not have."""
    return {
        "ltx_row": row,
        "ltx_status": record.status,
        "ltx_key": record.key or None,
        "ltx_video": record.video,
        "ltx_sha256": record.sha256,
        "ltx_bytes": record.video_bytes,
        "ltx_frames_sha256": record.frames_sha256,
        "ltx_seed": record.seed if seed is None else seed,
        "ltx_error_class": record.error_class,
        "ltx_error": record.error,
        "ltx_attempts": record.attempts,
        "ltx_render_seconds": record.timings.get("render"),
        "ltx_gpu_seconds": record.gpu_seconds,
        "ltx_reused": record.reused,
        "ltx_degraded": record.degraded,
        "ltx_worker": record.worker,
        "ltx_device": record.device,
        "ltx_finished_at": record.finished_at,
    }


def record_of_line(values: Mapping[str, Any]) -> RenderRecord:
    """The record behind an ok line of an earlier shard, as far as a line tells it."""
    return RenderRecord(
        key=values["ltx_key"],
        status="ok",
        video=values["ltx_video"],
        sha256=values["ltx_sha256"],
        video_bytes=values["ltx_bytes"],
        frames_sha256=values["ltx_frames_sha256"],
        seed=values.get("ltx_seed"),
        attempts=values["ltx_attempts"],
        gpu_seconds=values["ltx_gpu_seconds"],
        timings={"render": values["ltx_render_seconds"]} if values["ltx_render_seconds"] else {},
        degraded=values["ltx_degraded"],
        worker=values["ltx_worker"],
        device=values["ltx_device"],
        finished_at=values["ltx_finished_at"],
        reused=True,
    )


@dataclass(slots=True)
class OpenShard:
    """A shard that is being worked on: its table as read, its rows, and the lines that are settled so far."""

    shard: Shard
    epoch: int
    table: pa.Table
    rows: Sequence[Row]
    lines: list[dict[str, Any] | None] = field(default_factory=list)
    left: int = 0
    closed: bool = False

    def __post_init__(self) -> None:
        if not self.lines:
            self.lines = [None] * len(self.rows)
        self.left = sum(settled is None for settled in self.lines)

    def settle(self, index: int, record: RenderRecord) -> None:
        assert self.lines[index] is None, "a row has one terminal line"
        self.lines[index] = self._line(index, record)
        self.left -= 1

    def _line(self, index: int, record: RenderRecord) -> dict[str, Any]:
        row = self.rows[index]
        return line(row.row, record, None if row.request is None else row.request.seed)

    def failed_count(self) -> int:
        return sum(line is not None and line["ltx_status"] == "failed" for line in self.lines)

    def failed_keys(self) -> dict[int, str]:
        """Index and key of rows that failed, where they have a key."""
        lines = enumerate(self.lines)
        return {i: line["ltx_key"] for i, line in lines if line and line["ltx_status"] == "failed" and line["ltx_key"]}

    def amend(self, index: int, record: RenderRecord) -> None:
        """Give a settled row the record that turned out to stand."""
        self.lines[index] = self._line(index, record)

    def finished_table(self) -> pa.Table:
        """The manifest's columns, then ours."""
        ours = pa.Table.from_pylist(self.lines, schema=_COLUMNS)
        table = self.table
        for name in _COLUMNS.names:
            table = table.append_column(name, ours.column(name))
        return table


class Books:
    """Rows of open shards by key. Equal rows share one render: the first is the renderer, its twins reuse it."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[tuple[OpenShard, int]]] = {}

    def __len__(self) -> int:
        """Keys that are not settled."""
        return len(self._waiting)

    def expect(self, key: str, shard: OpenShard, index: int) -> bool:
        """Note that a row waits for `key`; True when nobody waited for it before, so that it must be rendered."""
        waiting = self._waiting.setdefault(key, [])
        waiting.append((shard, index))
        return len(waiting) == 1

    def settle(self, record: RenderRecord) -> list[tuple[OpenShard, RenderRecord]]:
        """Give every row of a key its line; returns shard and line's record for each."""
        settled = []
        for place, (shard, index) in enumerate(self._waiting.pop(record.key)):
            own = record if place == 0 or not record.ok else replace(record, reused=True)
            shard.settle(index, own)
            settled.append((shard, own))
        return settled
