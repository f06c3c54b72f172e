"""The driver: manifest -> schedule -> pool -> ledger -> summary.

It may die at any moment. Workers commit clips by themselves, a finished shard is one create-only file, and the same
command again finds both.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ltx_batch.admission import Admission, PreparedShard
from ltx_batch.books import Books, OpenShard
from ltx_batch.errors import InvalidRow, JobError, ManifestError, RunStopped
from ltx_batch.foresight import validate_job
from ltx_batch.job import JobSpec
from ltx_batch.ledger import Ledger
from ltx_batch.manifest import Manifest
from ltx_batch.paths import check_paths, refuse_local
from ltx_batch.pool import Died, Event, Finished, LocalPool, Pool, Started, StartFailed
from ltx_batch.recipe import make_recipe, run_id, with_precision
from ltx_batch.record import RenderRecord
from ltx_batch.renderer import check_job, pinned
from ltx_batch.schedule import Breaker, Schedule, Task, Verdict
from ltx_batch.storage import Storage
from ltx_batch.tally import Summary, Tally
from ltx_batch.text_phase import encode_texts
from ltx_batch.worker import WorkerPlan, open_output

WINDOW_ROWS = 2000  # tasks that wait in memory: enough to group by shape, little enough to stay small
OPEN_ROWS = 16_384  # rows of shards that are not finished: a rare shape must not keep every shard open behind it
_POLL_S = 0.5
_HEARTBEAT_S = 10.0

Listener = Callable[[Summary], None]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How this call treats the run.

    skip_invalid: bad rows are recorded as failed and the others rendered. retry: failed rows of finished shards are
    tried again, in a new epoch. check_media: finished shards are looked at again, since their media may have changed.
    """

    skip_invalid: bool = False
    retry: bool = False
    check_media: bool = False


def run(job: JobSpec, options: RunOptions | None = None, *, listen: Listener = lambda _: None) -> Summary:
    """Render what is missing of a job. Raises UsageError before anything is started; RunStopped never: see `stopped`."""
    return _Run(job, options or RunOptions(), listen).go()


def encode(job: JobSpec, options: RunOptions | None = None, *, listen: Listener = lambda _: None) -> Summary:
    """The text phase of a run alone, whatever `text` says. Raises as `run` does."""
    if job.model.renderer == "fake":
        raise JobError("model.renderer is fake, which reads no text: there is nothing to encode")
    if job.text_cache_uri is None:
        raise JobError("the job encodes inline and has no text_cache to fill; set text: precomputed, or a text_cache")
    return _Run(job, options or RunOptions(), listen, text_only=True).go()


@dataclass(slots=True)
class _Run:
    job: JobSpec
    options: RunOptions
    listen: Listener
    text_only: bool = False
    drain: threading.Event = field(default_factory=threading.Event)
    books: Books = field(default_factory=Books)
    pool: Pool | None = None
    started: bool = False
    exhausted: bool = False
    upcoming: Future[PreparedShard] | None = None
    open_rows: int = 0
    last_told_s: float = 0.0
    last_beat_s: float = 0.0
    # set by _open
    ledger: Ledger = field(init=False)
    storage: Storage = field(init=False)
    manifest: Manifest = field(init=False)
    recipe: dict[str, Any] = field(init=False)
    run: str = field(init=False)
    tally: Tally = field(init=False)
    schedule: Schedule = field(init=False)
    admission: Admission = field(init=False)
    source: Iterator[Future[PreparedShard]] = field(init=False)

    def go(self) -> Summary:
        check_paths(self.job)
        self._open()
        if self._finished_before():
            return self.tally.summary(idle=True)
        invalid = self._check()
        self.storage.probe()
        try:
            with _signals(self.drain):
                return self._tell(self._loop(invalid), final=True)
        finally:
            if self.pool is not None:
                self.pool.close()

    # before the first row

    def _open(self) -> None:
        self.storage = open_output(self.job)
        self.ledger = Ledger(self.storage)
        self.manifest = Manifest.open(self.job.manifest, options=self.job.storage.options)
        model = pinned(self.job.model, self.job.storage.options)
        self.job = self.job.model_copy(update={"model": model})
        self.recipe = make_recipe(self.job)
        self.run = run_id(self.manifest.fingerprint(), self.recipe, self.job)
        self.tally = Tally(self.run, self.manifest.rows, self.job.gpu_hour_price)
        self.schedule = Schedule(self.job.attempts, self.ledger.find, in_flight=self.job.worker.in_flight)
        self.admission = Admission(self.job, self.ledger, self.manifest, self.run, self.options.check_media)

    def _finished_before(self) -> bool:
        """Count finished shards; True where that is all there is to do. Raises JobError where there is no run to retry."""
        if self.options.retry and not self.text_only and self.ledger.read_run(self.run) is None:
            raise JobError(
                f"there is nothing to retry: this job, as it is now, was not run into {self.job.output} yet; use run"
            )
        shards = list(self.manifest.shards(self.job.shard_rows))
        reopened = self.admission.count_finished(shards, self.tally, retry=self.options.retry)
        self.tally.shards, self.tally.shards_done = len(shards), len(shards) - reopened
        return not reopened

    def _check(self) -> dict[tuple[str, int], str]:
        """Look at the job's values and at every row; returns broken rules by file and row (only with skip_invalid), else raises."""
        check_job(self.job)
        found = validate_job(self.manifest, self.job)
        whole = [issue for issue in found.errors if issue.row is None]
        if whole or (found.errors and not self.options.skip_invalid):
            raise ManifestError(found.errors)
        invalid: dict[tuple[str, int], str] = {}
        for issue in found.errors:
            place = (issue.file, issue.row or 0)
            text = f"{issue.column}: {issue.rule}" if issue.column else issue.rule
            invalid[place] = f"{invalid[place]}; {text}" if place in invalid else text
        return invalid

    def _freeze(self, invalid: dict[tuple[str, int], str]) -> None:
        """Resolve `auto` once: the first driver of a run that renders writes it down, and the others read it."""
        asked = self.ledger.read_run(self.run)
        if asked is None:
            precision, reason = self._pool().resolve_precision()
            described: dict[str, Any] = {
                "run": self.run,
                "job": self.job.model_dump(mode="json", exclude={"storage": {"options"}}),
                "recipe": self.recipe,
                "precision": precision,
                "precision_reason": reason,
                "manifest": self.manifest.fingerprint(),
            }
            # The text phase alone may go on another kind of machine: what `auto` means there must not bind the renders.
            asked = described if self.text_only else self.ledger.open_run(self.run, described)
        self.recipe = with_precision(self.recipe, asked["precision"])
        self.source = self.admission.prepare(self.recipe, invalid)

    def _pool(self) -> Pool:
        if self.pool is None:
            self.pool = open_pool(self.job)
            if self.pool.nodes > 1:
                refuse_local(self.job, self.pool.nodes)
        return self.pool

    # rows

    def _loop(self, invalid: dict[tuple[str, int], str]) -> str | None:
        """Until every row is settled; returns the reason where it ended before that."""
        breaker = Breaker(self.job.stop_after_failures, self.job.max_failed_fraction)
        try:
            self._freeze(invalid)
            self._encode_texts(invalid)
            while not self._done():
                self._feed()
                self._hand_out()
                for event in self._wait():
                    self._handle(event)
                self._kill_overdue()
                self._tell_now_and_then()
                if reason := breaker.tripped(self.tally.rendered, self.tally.tried_in_vain):
                    raise RunStopped(reason)
        except RunStopped as reason:
            return str(reason)
        left = self.drain.is_set() if self.text_only else self.tally.left
        return "drained on a signal; the same command again goes on" if left else None

    def _encode_texts(self, invalid: dict[tuple[str, int], str]) -> None:
        if self.text_only or (self.job.text == "stage" and self.job.model.renderer != "fake"):
            plan = WorkerPlan(self.job, self.recipe, self.recipe["precision"])
            keep_rows = 0 if self.text_only else OPEN_ROWS
            with (
                closing(self.admission.prepare(self.recipe, invalid, keep_rows=keep_rows)) as shards,
                closing(encode_texts(self._pool(), plan, shards)) as told,
            ):
                for self.tally.text in told:
                    self._tell_now_and_then()
                    if self.drain.is_set():
                        return

    def _done(self) -> bool:
        if self.text_only:
            return True
        if self.drain.is_set():
            self.schedule.withdraw()
            return self.schedule.busy == 0
        return self.exhausted and self.schedule.waiting == 0 and self.schedule.busy == 0

    def _feed(self) -> None:
        """Admit shards that are prepared, up to the window; never wait for one while there is anything else to do."""
        while not (self.drain.is_set() or self.exhausted or self._window_is_full()):
            if self.upcoming is None:
                self.upcoming = next(self.source, None)
            if self.upcoming is None:
                self.exhausted = True
            elif self.schedule.waiting + self.schedule.busy and not self.upcoming.done():
                return
            else:
                if not futures.wait([self.upcoming], timeout=_POLL_S).done:
                    return
                prepared, self.upcoming = self.upcoming.result(), None
                self._admit(prepared)

    def _window_is_full(self) -> bool:
        return self.schedule.waiting >= WINDOW_ROWS or self.open_rows >= OPEN_ROWS

    def _admit(self, prepared: PreparedShard) -> None:
        """Settle what is known of a shard and queue the rest; a key that somebody waits for is not queued again."""
        self.tally.ok -= prepared.reopened
        self.tally.shards_done += prepared.shard.closed
        self.open_rows += 0 if prepared.shard.closed else len(prepared.shard.rows)
        tasks = []
        for index, record in prepared.settled:
            self._settle_row(prepared.shard, index, record)
        for index, key, request, priority in prepared.wanted:
            known = prepared.known.get(key) or self.admission.failed.get(key)
            if self.books.expect(key, prepared.shard, index):
                if known is not None:
                    self._book(Verdict((known,)))
                else:
                    tasks.append(Task(key, request, priority, self.admission.attempt_of(key)))
        self.schedule.add(tasks, self.job.batch_size)
        self._close_if_complete(prepared.shard)

    def _hand_out(self) -> None:
        if self.schedule.waiting and not self.started:
            self._pool().start(WorkerPlan(self.job, self.recipe, self.recipe["precision"]))
            self.started = True
        for worker in self.schedule.ready_workers:
            while (unit := self.schedule.next(worker, time.monotonic())) is not None:
                self._pool().submit(worker, unit)

    def _wait(self) -> list[Event]:
        return self._pool().wait(_POLL_S) if self.started and not self._done() else []

    def _handle(self, event: Event) -> None:
        match event:
            case Started(worker):
                self.schedule.started(worker)
                self.tally.worker_ready()
            case Finished(worker, unit, records):
                self._book(self.schedule.finished(worker, unit, records, time.monotonic()))
                self._quarantine(worker)
            case Died(worker, cause, message):
                self._book(self.schedule.died(worker, cause, message))
                self._restart(worker, message)
            case StartFailed(worker, message, permanent):
                self.schedule.failed_start(worker)
                if permanent:
                    self.schedule.retire(worker)
                    began = self.tally.ready_s is not None
                    self._go_on_without(worker, message, "no worker is left" if began else "no worker can start")
                else:
                    self._restart(worker, message)

    def _restart(self, worker: str, message: str) -> None:
        if self.schedule.may_restart(worker):
            self._pool().restart(worker)
        else:
            self._go_on_without(worker, message, "every worker died too often (attempts.max_worker_deaths); the last")

    def _go_on_without(self, worker: str, message: str, last: str) -> None:
        """A slot is given up; the run ends with the last one."""
        if self.schedule.stranded:
            raise RunStopped(f"{last}: {message}")
        print(f"{worker} is given up, the run goes on without it: {message}", file=sys.stderr)

    def _quarantine(self, worker: str) -> None:
        """A worker on which row after row raises, while others are well, gets a new process."""
        if self.schedule.sick(worker):
            message = "row after row raised on this worker alone"
            self._pool().kill(worker, message)
            self._book(self.schedule.died(worker, "preempted", message))  # what it held is not to blame
            self.schedule.failed_start(worker)
            self._restart(worker, message)

    def _kill_overdue(self) -> None:
        for worker in self.schedule.overdue(time.monotonic()):
            message = "no progress within the row's time (attempts.timeout_s)"
            self._pool().kill(worker, message)
            self._handle(Died(worker, "timeout", message))  # at once: it must not be handed another unit

    # books

    def _book(self, verdict: Verdict) -> None:
        for key, facts in verdict.attempts:
            self.ledger.add_attempt(self.run, key, {**facts, "epoch": self.admission.epoch, "at_unix_s": time.time()})
        for record in verdict.records:
            if not record.ok:
                self.admission.failed[record.key] = record
            for shard, own in self.books.settle(record):
                self.tally.count(own)
                self._close_if_complete(shard)

    def _settle_row(self, shard: OpenShard, index: int, record: RenderRecord) -> None:
        shard.settle(index, record)
        self.tally.count(record, skipped=record.error_class == InvalidRow.__name__)

    def _close_if_complete(self, shard: OpenShard) -> None:
        if shard.left or shard.closed:
            return
        shard.closed = True
        self.open_rows -= len(shard.rows)
        self.tally.shards_done += 1
        self._let_ok_win(shard)
        if not self.ledger.write_shard(self.run, shard.shard.name, shard.epoch, shard.finished_table()):
            ours = len(shard.rows) - shard.failed_count()
            self.tally.mend(self.admission.count_ok(shard.shard.name, shard.epoch) - ours)

    def _let_ok_win(self, shard: OpenShard) -> None:
        """Another driver may have rendered since what failed here."""
        failed = shard.failed_keys()
        standing = self.admission.look_up(sorted(set(failed.values())))
        for index, key in failed.items():
            if key in standing:
                shard.amend(index, standing[key])
                self.tally.mend(1)

    def _tell_now_and_then(self) -> None:
        if time.monotonic() - self.last_told_s >= _POLL_S:
            self._tell(None)

    def _tell(self, stopped: str | None, *, final: bool = False) -> Summary:
        summary = self.tally.summary(
            workers=len(self.schedule.ready_workers), draining=self.drain.is_set(), stopped=stopped
        )
        self.last_told_s = time.monotonic()
        self.listen(summary)
        if not self.text_only and (final or self.last_told_s - self.last_beat_s >= _HEARTBEAT_S):
            self.last_beat_s = self.last_told_s
            self._beat(summary)
        return summary

    def _beat(self, summary: Summary) -> None:
        """Best effort: a store that fails for a moment must not end the run over its heartbeat."""
        try:
            self.ledger.write_status(self.run, {**summary.as_dict(), "at_unix_s": round(time.time(), 3)})
        except Exception as error:
            print(f"the heartbeat could not be written: {error}", file=sys.stderr)


def open_pool(job: JobSpec) -> Pool:
    if job.workers == 0:
        return LocalPool(job)
    from ltx_batch.ray_pool import RayPool

    return RayPool(job)


@contextmanager
def _signals(drain: threading.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM drains; the second ends the process with 130 or 143."""

    def on_signal(number: int, frame: Any) -> None:
        if drain.is_set():
            os._exit(128 + number)
        drain.set()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
