"""Ledger: where the output lives, and the one act that makes a video count.

    OUT/videos/ab/<key>.<sha12>.mp4                 never overwritten; sha12 = first 12 hex of its sha256; a picture is .png
    OUT/videos/ab/<key>.json                        the record of an ok render; creating it is the commit
    OUT/runs/<run>/run.json                         what the run was asked to do; the first writer's stands
    OUT/runs/<run>/shards/<shard>.<epoch>.parquet   one line a row of a finished shard
    OUT/runs/<run>/attempts/<key>.<n>.json          a failed attempt, n from 1
    OUT/runs/<run>/status.json                      heartbeat; the only file that is ever replaced

Any number of processes may do any of this at once, and any of them may die between two lines.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ltx_batch.record import RenderRecord
from ltx_batch.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa


class Ledger:
    """Reads and writes the output prefix. Thread-safe and picklable, as its storage is."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def find(self, key: str) -> RenderRecord | None:
        """The record that counts for `key`; None where there is none, or none that can be read."""
        try:
            record = RenderRecord.from_json(self.storage.read(_record_name(key)))
        except (FileNotFoundError, ValueError):
            return None
        return record if record.ok and record.key == key else None

    def commit(self, record: RenderRecord, video: Path) -> RenderRecord:
        """Publish `video`, a local file, as the clip of `record.key`.

        The video goes up first, then the record is created; whoever creates it has won. Returns the record that counts:
        ours, with `video`, `sha256`, `video_bytes`, `attempt_id` and the upload's seconds filled in, or the winner's with
        `reused` set, in which case our file is removed again unless it is the winner's very bytes.
        """
        sha256 = _sha256(video)
        name = f"videos/{record.key[:2]}/{record.key}.{sha256[:12]}{video.suffix}"
        started_s = time.perf_counter()
        self.storage.upload(video, name)
        ours = replace(
            record,
            video=name,
            sha256=sha256,
            video_bytes=video.stat().st_size,
            attempt_id=record.attempt_id or uuid4().hex,
            timings={**record.timings, "upload": round(time.perf_counter() - started_s, 4)},
            reused=False,
        )
        if self.storage.create(_record_name(record.key), ours.to_json()):
            return ours
        return self._settle(ours)

    def _settle(self, ours: RenderRecord) -> RenderRecord:
        """What counts when a record was there already: it may be our own, created by a request whose answer was lost."""
        standing = self.find(ours.key)
        if standing is None:
            # Torn or foreign: no writer of ours leaves that (links and puts are whole), so a disk or a hand did. Replacing
            # it is not create-only: two workers may both do so. The last record stands, and both videos are there.
            self.storage.replace(_record_name(ours.key), ours.to_json())
            standing = self.find(ours.key) or ours
        if standing.attempt_id == ours.attempt_id:
            return ours
        if standing.video != ours.video and ours.video is not None:
            self.storage.delete(ours.video)
        return replace(standing, reused=True)

    def open_run(self, run: str, description: Mapping[str, Any]) -> dict[str, Any]:
        """Create the run's description unless it has one; returns the one that stands."""
        name = f"runs/{run}/run.json"
        self.storage.create(name, _json(description))
        return dict(json.loads(self.storage.read(name)))

    def read_run(self, run: str) -> dict[str, Any] | None:
        return self._read_json(f"runs/{run}/run.json")

    def runs(self) -> list[str]:
        return self.storage.folders("runs")

    def finished_shards(self, run: str) -> dict[str, int]:
        """Shard -> its latest epoch. One listing."""
        latest: dict[str, int] = {}
        for shard, epoch in _numbered(self.storage.list(f"runs/{run}/shards")):
            latest[shard] = max(epoch, latest.get(shard, epoch))
        return latest

    def write_shard(self, run: str, shard: str, epoch: int, table: pa.Table) -> bool:
        """Publish a finished shard's lines; False where another writer finished it first."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        return self._create_once(_shard_name(run, shard, epoch), sink.getvalue().to_pybytes())

    def read_shard(self, run: str, shard: str, epoch: int, columns: list[str] | None = None) -> pa.Table:
        """Raises FileNotFoundError."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = pq.ParquetFile(pa.BufferReader(self.storage.read(_shard_name(run, shard, epoch))))
        # Not read_table: it starts Arrow's threads, which now and then abort the process when it ends soon after.
        return file.read(columns=columns, use_threads=False)

    def add_attempt(self, run: str, key: str, attempt: Mapping[str, Any]) -> int:
        """Note a failed attempt under the next free number, which it returns.

        `attempt` should hold something of its own (a worker's name, a time): an equal one counts as the same attempt.
        """
        data, number = _json(attempt), 1
        while not self._create_once(_attempt_name(run, key, number), data):
            number += 1
        return number

    def attempts(self, run: str) -> dict[str, list[int]]:
        """Key -> the numbers of its failed attempts, rising. One listing."""
        numbers: dict[str, list[int]] = {}
        for key, number in _numbered(self.storage.list(f"runs/{run}/attempts")):
            numbers.setdefault(key, []).append(number)
        return {key: sorted(found) for key, found in numbers.items()}

    def read_attempt(self, run: str, key: str, number: int) -> dict[str, Any]:
        """Raises FileNotFoundError."""
        return dict(json.loads(self.storage.read(_attempt_name(run, key, number))))

    def write_status(self, run: str, status: Mapping[str, Any]) -> None:
        self.storage.replace(f"runs/{run}/status.json", _json(status))

    def read_status(self, run: str) -> dict[str, Any] | None:
        return self._read_json(f"runs/{run}/status.json")

    def _read_json(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self.storage.read(name)))
        except FileNotFoundError:
            return None

    def _create_once(self, name: str, data: bytes) -> bool:
        """Create-only; a file that holds exactly our bytes is our own repeated request, and a success."""
        return self.storage.create(name, data) or self.storage.read(name) == data


def _record_name(key: str) -> str:
    return f"videos/{key[:2]}/{key}.json"


def _shard_name(run: str, shard: str, epoch: int) -> str:
    return f"runs/{run}/shards/{shard}.{epoch}.parquet"


def _attempt_name(run: str, key: str, number: int) -> str:
    return f"runs/{run}/attempts/{key}.{number}.json"


def _numbered(names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """`folder/<stem>.<number>.<suffix>` -> (stem, number); other files are passed over."""
    for name in names:
        parts = name.rpartition("/")[2].rsplit(".", 2)
        if len(parts) == 3 and parts[1].isdigit():
            yield parts[0], int(parts[1])


def _json(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, indent=1).encode() + b"\n"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
