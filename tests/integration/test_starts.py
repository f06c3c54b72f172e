"""Workers that cannot start: what ends with them, a worker or the run."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from job_runs import check_output, make_job, write_manifest

from ltx_batch import driver
from ltx_batch.model.quantize.policy import Resolved
from ltx_batch.pool import Died, Event, Finished, Started, StartFailed
from ltx_batch.schedule import WorkUnit
from ltx_batch.text_worker import Encoded
from ltx_batch.worker import Worker, WorkerPlan

BAD = "CheckpointError: transformer/model.safetensors is not what the run began with"


class Slots:
    """A pool whose workers are real and share this process, and start or fail as scripted: `starts` are the outcomes of a
    slot's starts in order, "ok" after the last; `deaths` the units that it takes in a life before it dies."""

    nodes = 1

    def __init__(self, starts: dict[str, list[str]], deaths: dict[str, int]) -> None:
        self._starts = defaultdict(deque, {slot: deque(outcomes) for slot, outcomes in starts.items()})
        self._deaths = deaths
        self._slots = list(starts)
        self._events: deque[Event] = deque()
        self._worker: Worker | None = None
        self._taken: dict[str, int] = {}

    def resolve_precision(self) -> Resolved:
        return Resolved("fp32", "a CPU")

    def encode(self, plan: WorkerPlan, batches: Iterator[Sequence[str]]) -> Generator[Encoded]:
        yield Encoded()

    def start(self, plan: WorkerPlan) -> None:
        self._worker = Worker(plan)
        for slot in self._slots:
            self.restart(slot)

    def restart(self, worker: str) -> None:
        outcome = self._starts[worker].popleft() if self._starts[worker] else "ok"
        self._taken[worker] = 0
        self._events.append(Started(worker, {}) if outcome == "ok" else StartFailed(worker, outcome, True))

    def submit(self, worker: str, unit: WorkUnit) -> None:
        assert self._worker is not None
        self._taken[worker] += 1
        if self._taken[worker] == self._deaths.get(worker, 0):
            self._events.append(Died(worker, "crash", "scripted"))
        else:
            self._events.append(Finished(worker, unit.id, self._worker.run(unit)))

    def wait(self, timeout_s: float) -> list[Event]:
        assert self._events, "the driver waits for what will never be"
        return [self._events.popleft()]

    def kill(self, worker: str, reason: str) -> None: ...

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()


def outcome(
    folder: Path, monkeypatch: pytest.MonkeyPatch, starts: dict[str, list[str]], deaths: dict[str, int]
) -> tuple[Any, Any]:
    """Job and summary of a run on such slots."""
    monkeypatch.setattr(driver, "open_pool", lambda job: Slots(starts, deaths))
    job = make_job(
        write_manifest(folder, [f"row {index}" for index in range(12)]),
        folder / "out",
        worker={"in_flight": 1},
        video={"codec": "fake"},
    )
    return job, driver.run(job)


def test_a_worker_that_cannot_be_restarted_ends_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job, summary = outcome(tmp_path, monkeypatch, {"a": ["ok", BAD], "b": []}, {"a": 2})
    assert (summary.exit_code, summary.ok) == (0, 12)
    check_output(job, summary.run)
    assert f"a is given up, the run goes on without it: {BAD}" in capsys.readouterr().err


def test_so_does_one_that_cannot_start_beside_a_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, summary = outcome(tmp_path, monkeypatch, {"b": [], "a": [BAD]}, {})
    assert (summary.exit_code, summary.ok) == (0, 12)


def test_the_last_worker_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, summary = outcome(tmp_path, monkeypatch, {"a": ["ok", BAD], "b": ["ok", BAD]}, {"a": 2, "b": 3})
    assert summary.exit_code == 3 and 0 < summary.ok < 12
    assert summary.stopped == f"no worker is left: {BAD}"


def test_the_first_start_of_all_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, summary = outcome(tmp_path, monkeypatch, {"a": [BAD], "b": []}, {})
    assert (summary.exit_code, summary.ok, summary.stopped) == (3, 0, f"no worker can start: {BAD}")
