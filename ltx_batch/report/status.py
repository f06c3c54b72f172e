"""How a run stands, from its heartbeat and its finished shards."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ltx_batch.job import JobSpec
from ltx_batch.ledger import Ledger
from ltx_batch.manifest import Manifest
from ltx_batch.report.runs import find_run, read_lines
from ltx_batch.worker import open_output

DEAD_AFTER_S = 60.0  # a driver writes its heartbeat every 10 s
State = Literal["not started", "running", "silent", "stopped", "finished"]
_TOP_ERRORS = 5
_MESSAGE_CHARS = 160


@dataclass(frozen=True, slots=True)
class RunStatus:
    """`rendered`, `seconds`, `gpu_seconds` and `cost` are those of the last call. `silent`: neither finished nor heard of
    for `DEAD_AFTER_S`, so that its driver is probably dead."""

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
    ok, failed, shards_done, errors = _finished(ledger, run)
    heard = dict(beat or {})
    age_s = time.time() - heard["at_unix_s"] if beat else None
    # A heartbeat may be older than the last shard, and finished shards know nothing of rows in open ones.
    if heard.get("ok", 0) + heard.get("failed", 0) > ok + failed:
        ok, failed, errors = heard["ok"], heard["failed"], heard["top_errors"]
    told = {name: heard[name] for name in _TOLD if name in heard}
    state = _state(ok + failed == manifest.rows, heard.get("stopped"), age_s)
    return RunStatus(
        **told,
        run=run,
        state=state,
        rows=manifest.rows,
        ok=ok,
        failed=failed,
        reused=ok - min(ok, heard.get("rendered", 0)),
        shards=shards,
        shards_done=shards_done,
        heartbeat_age_s=None if age_s is None else round(age_s, 1),
        top_errors=tuple((message, count) for message, count in errors),
    )


_TOLD = ("rendered", "seconds", "gpu_seconds", "cost", "rows_per_s", "eta_s", "workers", "stopped")


def _finished(ledger: Ledger, run: str) -> tuple[int, int, int, list[tuple[str, int]]]:
    """Ok rows, failed rows, shards, and the most frequent errors of finished shards."""
    statuses: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    shards = 0
    for table in read_lines(ledger, run):
        shards += 1
        lines = table.select(["ltx_status", "ltx_error_class", "ltx_error"]).to_pylist()
        statuses.update(line["ltx_status"] for line in lines)
        errors.update(_described(line) for line in lines if line["ltx_status"] == "failed")
    return statuses["ok"], statuses["failed"], shards, errors.most_common(_TOP_ERRORS)


def _described(line: dict[str, Any]) -> str:
    first_line = (line["ltx_error"] or "").partition("\n")[0]
    return f"{line['ltx_error_class']}: {first_line}"[:_MESSAGE_CHARS]


def _state(finished: bool, stopped: str | None, age_s: float | None) -> State:
    if finished:
        return "finished"
    if stopped:
        return "stopped"
    return "running" if age_s is not None and age_s < DEAD_AFTER_S else "silent"
