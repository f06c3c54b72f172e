"""Admission: from shards of the manifest to rows that must be rendered.

Everything here reads and nothing writes, so the next shard is prepared in a thread while the driver works on this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from ltx_batch.books import OpenShard, record_of_line
from ltx_batch.errors import InvalidRow, LoraError, MediaError
from ltx_batch.job import JobSpec
from ltx_batch.ledger import Ledger
from ltx_batch.manifest import Manifest, Row, Shard, hash_media, job_loras, resolve_rows, with_lora_hashes
from ltx_batch.recent import Recent
from ltx_batch.record import RenderRecord
from ltx_batch.request import Keys, RenderRequest
from ltx_batch.tally import Tally

REMEMBERED = 65_536  # hashes of media and LoRA files, some 16 MB; others are asked for again
_THREADS = 16
_EARLIER_RUNS = 8  # runs whose shards are joined before keys are looked up one by one


@dataclass(frozen=True, slots=True)
class PreparedShard:
    """A shard with what is known of its rows: `settled` need no render and have no key in flight, `wanted` have a key
    (index, key, request, priority), and `known` holds the records that exist already. `reopened` ok lines of an earlier
    epoch no longer hold."""

    shard: OpenShard
    settled: list[tuple[int, RenderRecord]] = field(default_factory=list)
    wanted: list[tuple[int, str, RenderRequest, int]] = field(default_factory=list)
    known: dict[str, RenderRecord] = field(default_factory=dict)
    reopened: int = 0


@dataclass(frozen=True, slots=True)
class _Todo:
    shard: Shard
    epoch: int
    previous: int | None  # the epoch whose ok lines are kept


class Admission:
    """Decides which shards are open in this call, and prepares them one after the other."""

    def __init__(self, job: JobSpec, ledger: Ledger, manifest: Manifest, run: str, check_media: bool) -> None:
        self.failed: dict[str, RenderRecord] = {}  # keys that failed in this call: their later twins fail with them
        self._job, self._ledger, self._manifest, self._run = job, ledger, manifest, run
        self._check_media = check_media
        self._todo: list[_Todo] = []
        self._epoch = 0
        self._looked = self._fresh = False
        self._kept: dict[str, Future[PreparedShard]] = {}
        self._earlier: list[tuple[str, dict[str, int]]] = []
        self._charged: Counter[str] = Counter()
        self._sha256: Recent[str, str] = Recent(REMEMBERED)  # by URI: media and LoRA files of many rows are read once

    def count_finished(self, shards: Sequence[Shard], tally: Tally, *, retry: bool) -> int:
        """Count the rows of finished shards; returns how many shards this call has to work on."""
        finished = self._ledger.finished_shards(self._run)
        counts = dict(zip(finished, self._threads(self._count_lines, finished.items()), strict=True))
        again = {name for name, (_, failed) in counts.items() if self._check_media or (retry and failed)}
        self._epoch = 1 + max((finished[name] for name in again), default=-1)
        for shard in shards:
            ok, failed = counts.get(shard.name, (0, 0))
            if shard.name not in finished:
                self._todo.append(_Todo(shard, self._epoch, None))
            elif shard.name in again:
                self._todo.append(_Todo(shard, self._epoch, finished[shard.name]))
                tally.count_finished(ok, 0)
            else:
                tally.count_finished(ok, failed)
        return len(self._todo)

    def prepare(
        self, recipe: Mapping[str, Any], invalid: Mapping[tuple[str, int], str], *, keep_rows: int = 0
    ) -> Generator[Future[PreparedShard]]:
        """Open shards in the manifest's order, each begun in a thread while the caller has the one before it.

        The first shards, up to `keep_rows` rows together, are kept for the next call, which does not prepare them again.
        """
        self._look_around()
        keys, ahead = Keys(recipe), ThreadPoolExecutor(max_workers=1)
        kept, self._kept = self._kept, {}
        pending = None
        try:
            for todo in self._todo:
                begun = kept.pop(todo.shard.name, None) or ahead.submit(self._prepare, todo, keys, invalid)
                keep_rows -= todo.shard.rows
                if keep_rows >= 0:
                    self._kept[todo.shard.name] = begun
                pending, ready = begun, pending
                if ready is not None:
                    yield ready
            if pending is not None:
                yield pending
        finally:
            ahead.shutdown(wait=False, cancel_futures=True)  # who drains waits for no shard that nobody wants any more

    def count_ok(self, shard: str, epoch: int) -> int:
        """Ok lines of a finished shard, as it stands."""
        return self._count_lines((shard, epoch))[0]

    def look_up(self, keys: Sequence[str]) -> dict[str, RenderRecord]:
        """The records that stand in the ledger, as reused ones."""
        found = zip(keys, self._threads(self._ledger.find, keys), strict=True)
        return {key: replace(record, reused=True) for key, record in found if record is not None}

    def attempt_of(self, key: str) -> int:
        """The number of a key's next attempt; earlier drivers of this epoch count, and one try is always left."""
        return min(1 + self._charged[key], self._job.attempts.max_attempts)

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def fresh(self) -> bool:
        """Nothing was ever rendered into this output."""
        self._look_around()
        return self._fresh

    def _look_around(self) -> None:
        """What other runs and earlier drivers left in this output."""
        if self._looked:  # what this run writes meanwhile is no earlier run's
            return
        self._looked = True
        others = [run for run in self._ledger.runs() if run != self._run]
        attempts = self._ledger.attempts(self._run)
        self._fresh = not others and not attempts and self._ledger.read_status(self._run) is None
        self._earlier = [(run, self._ledger.finished_shards(run)) for run in others[-_EARLIER_RUNS:]]
        places = [(key, number) for key, numbers in attempts.items() for number in numbers]
        facts = self._threads(lambda place: self._ledger.read_attempt(self._run, *place), places)
        for (key, _), fact in zip(places, facts, strict=True):
            self._charged[key] += fact["charged"] and fact["epoch"] == self._epoch

    def _prepare(self, todo: _Todo, keys: Keys, invalid: Mapping[tuple[str, int], str]) -> PreparedShard:
        table = self._manifest.read(todo.shard)
        rows = resolve_rows(
            table,
            manifest=self._manifest,
            shard=todo.shard,
            defaults=self._job.defaults,
            loras=job_loras(self._job),
        )
        lines: list[dict[str, Any] | None] = [None] * len(rows)
        if todo.previous is not None:
            lines = self._kept_lines(todo)
        prepared = PreparedShard(OpenShard(todo.shard, todo.epoch, table, rows, lines))
        kept = sum(line is not None for line in lines)
        requests = self._threads(self._with_hashes, rows)
        for index, (row, request) in enumerate(zip(rows, requests, strict=True)):
            reason = invalid.get((row.file, row.row)) or "; ".join(str(issue) for issue in row.issues)
            line = lines[index]
            if line is not None and (not self._check_media or self._still_holds(line, request, keys)):
                continue
            prepared.shard.lines[index] = None
            if reason or not isinstance(request, RenderRequest):
                error = InvalidRow(reason) if reason else request
                prepared.settled.append((index, _refused(error)))
            else:
                prepared.wanted.append((index, keys.of(request), request, row.priority))
        prepared.shard.left = len(prepared.settled) + len(prepared.wanted)
        prepared.shard.closed = prepared.shard.left == 0
        known = self._known(todo.shard, {key for _, key, _, _ in prepared.wanted})
        return replace(prepared, known=known, reopened=kept + prepared.shard.left - len(rows))

    def _kept_lines(self, todo: _Todo) -> list[dict[str, Any] | None]:
        assert todo.previous is not None
        table = self._ledger.read_shard(self._run, todo.shard.name, todo.previous)
        ours = table.select([name for name in table.column_names if name.startswith("ltx_")])
        return [line if line["ltx_status"] == "ok" else None for line in ours.to_pylist()]

    def _still_holds(self, line: Mapping[str, Any], request: Any, keys: Keys) -> bool:
        return isinstance(request, RenderRequest) and keys.of(request) == line["ltx_key"]

    def _with_hashes(self, row: Row) -> RenderRequest | MediaError | LoraError | None:
        request, options = row.request, self._job.storage.options
        if request is None or not (request.conditions or request.input_media or request.loras):
            return request
        try:
            hashed = hash_media(request, options=options, cache=self._sha256)
            return with_lora_hashes(hashed, options, self._sha256)
        except (MediaError, LoraError) as error:
            return error

    def _known(self, shard: Shard, keys: set[str]) -> dict[str, RenderRecord]:
        """Records of `keys`: from the same shard of earlier runs, then by looking each of the others up."""
        if self._fresh:
            return {}
        known: dict[str, RenderRecord] = {}
        for run, finished in self._earlier:
            if shard.name in finished:
                lines = self._ledger.read_shard(run, shard.name, finished[shard.name]).to_pylist()
                known |= {
                    line["ltx_key"]: record_of_line(line)
                    for line in lines
                    if line["ltx_status"] == "ok" and line["ltx_key"] in keys
                }
        return known | self.look_up(sorted(keys - known.keys()))

    def _count_lines(self, finished: tuple[str, int]) -> tuple[int, int]:
        name, epoch = finished
        statuses = self._ledger.read_shard(self._run, name, epoch, columns=["ltx_status"]).column("ltx_status")
        ok = sum(status == "ok" for status in statuses.to_pylist())
        return ok, len(statuses) - ok

    def _threads(self, function: Any, items: Any) -> list[Any]:
        with ThreadPoolExecutor(max_workers=_THREADS) as threads:
            return list(threads.map(function, items))


def _refused(error: Exception | None) -> RenderRecord:
    """The record of a row that never became a request with a key."""
    assert error is not None
    return RenderRecord(
        key="", status="failed", attempts=0, error_class=type(error).__name__, error=str(error), retryable=False
    )
