"""How a run stands, from its heartbeat and its finished shards."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ltx_batch.job import JobSpec
from ltx_batch.ledger import Ledger
from ltx_batch.manifest import Manifest
from ltx_batch.report.runs import find_run, read_lines
from ltx_batch.worker import open_output

DEAD_AFTER_S = 60.0  # a driver writes its heartbeat every 10 s
State = Literal["not started", "running", "silent", "stopped", "finished"]
Source = Literal["heartbeat", "shards"]
_TOP_ERRORS = 5
_MESSAGE_CHARS = 160


@dataclass(frozen=True, slots=True)
class RunStatus:
    """`silent`: neither finished nor heard of for `DEAD_AFTER_S`, so that its driver is probably dead.

    All counts are from one `source`. The heartbeat knows rows of open shards; its `rendered`, `seconds`, `gpu_seconds` and
    `cost` are the last call's. Where it is older than the finished shards, these are counted: all that the run rendered.
    """

    run: str | None
    state: State
    rows: int
    ok: int = 0
    failed: int = 0
    rendered: int = 0
    reused: int = 0
    seconds: float | None = None
    gpu_seconds: float = 0.0
    cost: float | None = None
    rows_per_s: float = 0.0
    eta_s: float | None = None
    workers: int = 0
    shards: int = 0
    shards_done: int = 0
    heartbeat_age_s: float | None = None
    source: Source | None = None
    stopped: str | None = None
    top_errors: tuple[tuple[str, int], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_status(job: JobSpec) -> RunStatus:
    """Raises JobError or ManifestError where the job's run cannot be named."""
    manifest = Manifest.open(job.manifest, options=job.storage.options)
    ledger = Ledger(open_output(job))
    run = find_run(job, manifest, ledger)
    beat = ledger.read_status(run) if run is not None else None
    shards = sum(1 for _ in manifest.shards(job.shard_rows))
    if run is None or (beat is None and ledger.read_run(run) is None):
        return RunStatus(run, "not started", manifest.rows, shards=shards)
    age_s = time.time() - beat["at_unix_s"] if beat else None
    counted = _finished(ledger, run, job.gpu_hour_price)
    settled = 0 if beat is None else beat["ok"] + beat["failed"]
    # While failed rows are retried the shards of the last epoch still stand, and only the heartbeat knows of rows to come.
    running = age_s is not None and age_s < DEAD_AFTER_S and settled < manifest.rows
    by_beat = beat is not None and (running or settled >= counted["ok"] + counted["failed"])
    told = _told(beat) if by_beat and beat is not None else counted
    if told["stopped"] or not running:  # of workers that are no more
        told |= {"rows_per_s": 0.0, "eta_s": None, "workers": 0}
    return RunStatus(
        **told,
        run=run,
        state=_state(told["ok"] + told["failed"] == manifest.rows, told["stopped"], running),
        rows=manifest.rows,
        shards=shards,
        heartbeat_age_s=None if age_s is None else round(age_s, 1),
        source="heartbeat" if by_beat else "shards",
    )


_COLUMNS = ["ltx_status", "ltx_reused", "ltx_gpu_seconds", "ltx_error_class", "ltx_error"]
_TOLD = ("ok", "failed", "rendered", "seconds", "gpu_seconds", "cost", "rows_per_s", "eta_s", "workers", "stopped")


def _told(beat: Mapping[str, Any]) -> dict[str, Any]:
    errors = tuple((message, count) for message, count in beat.get("top_errors", ()))
    told = {name: beat.get(name) for name in _TOLD}
    reused = max(0, beat["ok"] - beat["rendered"])
    return {**told, "reused": reused, "shards_done": beat.get("shards_done", 0), "top_errors": errors}


def _finished(ledger: Ledger, run: str, gpu_hour_price: float | None) -> dict[str, Any]:
    """What the lines of finished shards say."""
    counts: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    shards, gpu_seconds = 0, 0.0
    for table in read_lines(ledger, run):
        shards += 1
        for line in table.select(_COLUMNS).to_pylist():
            if line["ltx_status"] == "failed":
                counts["failed"] += 1
                errors[_described(line)] += 1
            else:
                counts["reused" if line["ltx_reused"] else "rendered"] += 1
                gpu_seconds += 0.0 if line["ltx_reused"] else line["ltx_gpu_seconds"] or 0.0
    return {
        "ok": counts["rendered"] + counts["reused"],
        **{name: counts[name] for name in ("failed", "rendered", "reused")},
        "gpu_seconds": round(gpu_seconds, 3),
        "cost": None if gpu_hour_price is None else round(gpu_seconds / 3600 * gpu_hour_price, 4),
        "shards_done": shards,
        "top_errors": tuple(errors.most_common(_TOP_ERRORS)),
        "stopped": None,
    }


def _described(line: dict[str, Any]) -> str:
    first_line = (line["ltx_error"] or "").partition("\n")[0]
    return f"{line['ltx_error_class']}: {first_line}"[:_MESSAGE_CHARS]


def _state(finished: bool, stopped: str | None, running: bool) -> State:
    if finished:
        return "finished"
    if stopped:
        return "stopped"
    return "running" if running else "silent"
