"""Two runs, row by row, over the cores of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ltx_batch.errors import JobError, MediaError, RunStopped
from ltx_batch.ledger import Ledger
from ltx_batch.media import read_media
from ltx_batch.quality.clips import ClipQuality, Frames, compare_clips, mismatch
from ltx_batch.quality.metrics import unavailable
from ltx_batch.quality.rows import JoinedBy, Pair, Reason, RowQuality, join, read_run
from ltx_batch.storage import Storage

Listener = Callable[[int, int], None]
Outcome = ClipQuality | tuple[Reason, str]
_Videos = tuple[str, str]
_Compare = Callable[[_Videos], Outcome]


@dataclass(frozen=True, slots=True)
class Run:
    """A run of an output. `precision` is the one that it really had, `crf` that of its videos: 0 is lossless."""

    storage: Storage
    name: str
    precision: str | None
    crf: int | None

    @property
    def label(self) -> str:
        return f"{self.name} ({self.precision})" if self.precision else self.name


@dataclass(frozen=True, slots=True)
class RunsQuality:
    """Every row that either run has a line for, but those `beyond_limit`; `unavailable` metrics with what to do."""

    a: Run
    b: Run
    joined_by: JoinedBy
    rows: tuple[RowQuality, ...]
    beyond_limit: int
    unavailable: Mapping[str, str]

    @property
    def compared(self) -> tuple[RowQuality, ...]:
        return tuple(row for row in self.rows if row.quality is not None)

    @property
    def skipped(self) -> tuple[RowQuality, ...]:
        return tuple(row for row in self.rows if row.quality is None)


def compare_runs(
    out_a: str,
    out_b: str,
    *,
    run_a: str | None = None,
    run_b: str | None = None,
    limit: int | None = None,
    workers: int | None = None,
    options: Mapping[str, Any] | None = None,
    listen: Listener | None = None,
) -> RunsQuality:
    """Compare the clips of two runs, A as the reference; both may lie in one output.

    `run_a` and `run_b` are the beginnings of runs' names, needed where an output has several. `limit` is the most pairs
    to compare. `workers` are processes with one thread each, by default as many as this process may use cores; 0: no
    other process. `options` are fsspec's, for both outputs. `listen` hears how many pairs of how many are done.

    Raises JobError where a run is not to be found or the two have no row in common, RunStopped where a process dies.
    """
    a, b = _find(out_a, run_a, "a", options), _find(out_b, run_b, "b", options)
    joined_by, pairs = join(*(read_run(Ledger(run.storage), run.name) for run in (a, b)))
    if not any(pair.a and pair.b for pair in pairs):
        raise JobError(f"run {a.name} and run {b.name} have no finished row in common, by row_id, prompt or place")
    chosen = _limited(pairs, limit)
    outcomes = _compare(a, b, _videos(chosen), workers, listen or (lambda done, total: None))
    rows = tuple(_settled(pair, outcomes) for pair in chosen)
    return RunsQuality(a, b, joined_by, rows, len(pairs) - len(chosen), unavailable())


@contextmanager
def local_video(storage: Storage, name: str) -> Iterator[Path]:
    """A video of an output as a local file. Raises FileNotFoundError."""
    if storage.is_local:
        yield Path(storage.path(name))
        return
    with tempfile.TemporaryDirectory(prefix="ltx_batch-") as folder:
        target = Path(folder, Path(name).name)
        storage.download(name, target)
        yield target


def _find(output: str, wanted: str | None, side: str, options: Mapping[str, Any] | None) -> Run:
    storage = Storage(output, options=options)
    ledger = Ledger(storage)
    runs = ledger.runs()
    if not runs:
        raise JobError(f"{output} has no runs: name the output of a job, the folder or URI with runs/ and videos/")
    found = [run for run in runs if run.startswith(wanted or "")]
    if len(found) != 1:
        named = f"run {wanted}" if wanted else "more than one run"
        listed = "\n".join(f"  {_run(ledger, run).label}" for run in runs)
        raise JobError(f"{output} has {'no ' if not found else ''}{named}; choose with --run-{side}:\n{listed}")
    return _run(ledger, found[0])


def _run(ledger: Ledger, name: str) -> Run:
    described = ledger.read_run(name) or {}
    video = described.get("recipe", {}).get("video", {})
    return Run(ledger.storage, name, described.get("precision"), video.get("crf"))


def _limited(pairs: Sequence[Pair], limit: int | None) -> list[Pair]:
    """The first `limit` pairs that can be compared, and what stands before them."""
    if limit is None:
        return list(pairs)
    chosen, left = [], limit
    for pair in pairs:
        if not left:
            break
        chosen.append(pair)
        left -= pair.fault() is None
    return chosen


def _videos(pairs: Sequence[Pair]) -> list[_Videos]:
    """What there is to compare; equal rows share a video and are compared once."""
    return list(dict.fromkeys(pair.videos for pair in pairs if pair.fault() is None))


def _settled(pair: Pair, outcomes: Mapping[_Videos, Outcome]) -> RowQuality:
    outcome: Outcome = pair.fault() or outcomes[pair.videos]
    if isinstance(outcome, ClipQuality):
        return RowQuality(pair, outcome)
    reason, detail = outcome
    return RowQuality(pair, None, reason, detail)


def _compare(
    a: Run, b: Run, videos: Sequence[_Videos], workers: int | None, listen: Listener
) -> dict[_Videos, Outcome]:
    outcomes: dict[_Videos, Outcome] = {}
    compare = partial(_outcome, a.storage, b.storage)
    count = min(len(os.sched_getaffinity(0)) if workers is None else workers, len(videos))
    listen(0, len(videos))
    for each, outcome in _in_processes(compare, videos, count) if count else _here(compare, videos):
        outcomes[each] = outcome
        listen(len(outcomes), len(videos))
    return outcomes


def _here(compare: _Compare, videos: Sequence[_Videos]) -> Iterator[tuple[_Videos, Outcome]]:
    for each in videos:
        yield each, compare(each)


def _in_processes(compare: _Compare, videos: Sequence[_Videos], count: int) -> Iterator[tuple[_Videos, Outcome]]:
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the locks of whatever runs threads here
    with ProcessPoolExecutor(count, mp_context=spawn, initializer=_start_worker) as pool:
        futures = {pool.submit(compare, each): each for each in videos}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise RunStopped(
                "a process ended while it compared clips, mostly for want of memory; try again with fewer --workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    """One thread each; and Ctrl-C, which a terminal sends to all, ends a worker without a word."""
    from ltx_batch.model.lpips import pin_threads

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    pin_threads(1)


def _outcome(a: Storage, b: Storage, videos: _Videos) -> Outcome:
    try:
        reference, other = _read(a, videos[0], "A"), _read(b, videos[1], "B")
        if fault := mismatch(reference, other):
            return "differs", fault
        return compare_clips(reference, other)
    except MediaError as error:
        return "unreadable", str(error)


def _read(storage: Storage, name: str, side: str) -> Frames:
    try:
        with local_video(storage, name) as path:
            return read_media(path)
    except (MediaError, OSError) as error:
        raise MediaError(f"in {side}: {error}") from error
