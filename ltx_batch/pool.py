"""Where units are worked on: the mechanism below the schedule's policy.

A pool has slots, each with one worker. It starts workers, hands them units and reports what happens; it decides nothing.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ltx_batch.errors import RunStopped
from ltx_batch.job import JobSpec
from ltx_batch.model.quantize.policy import Resolved
from ltx_batch.recipe import job_precision
from ltx_batch.record import RenderRecord
from ltx_batch.schedule import Cause, WorkUnit
from ltx_batch.text_tries import TextTries
from ltx_batch.text_worker import Encoded, TextWorker
from ltx_batch.worker import Worker, WorkerPlan


@dataclass(frozen=True, slots=True)
class Started:
    """A slot's worker is ready for units; `about` is `Worker.describe()`."""

    worker: str
    about: dict[str, Any]


@dataclass(frozen=True, slots=True)
class StartFailed:
    """A slot's worker could not be made ready. `permanent`: no other try on this machine or another can help."""

    worker: str
    message: str
    permanent: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """A unit came back, with one record for each of its tasks in order."""

    worker: str
    unit: int
    records: list[RenderRecord]


@dataclass(frozen=True, slots=True)
class Died:
    """A slot's process ended; whatever it held is lost unless it was committed."""

    worker: str
    cause: Cause
    message: str


Event = Started | StartFailed | Finished | Died


class Pool(Protocol):
    nodes: int

    def resolve_precision(self) -> Resolved:
        """The precision that the job's `auto` means on this pool's devices, and why."""
        ...

    def encode(self, plan: WorkerPlan, batches: Iterator[Sequence[str]]) -> Generator[Encoded]:
        """Bring texts into the cache by workers that hold the text encoder alone, and are gone at the end.

        An empty batch says that there is nothing yet. Tells what was done, batch by batch, and nothing now and then; raises
        RunStopped where it cannot go on.
        """
        ...

    def start(self, plan: WorkerPlan) -> None:
        """Begin to make every slot's worker ready; each reports Started or StartFailed."""
        ...

    def submit(self, worker: str, unit: WorkUnit) -> None: ...

    def wait(self, timeout_s: float) -> list[Event]:
        """What happened, in the order it did; empty after `timeout_s`."""
        ...

    def kill(self, worker: str, reason: str) -> None:
        """End a worker's process; nothing more is reported of it."""
        ...

    def restart(self, worker: str) -> None:
        """Give a slot that reported Died or StartFailed a new worker."""
        ...

    def close(self) -> None: ...


class LocalPool:
    """One worker, in this process: `workers: 0`. A row that ends its process ends the run, and a hang cannot be cured."""

    nodes = 1
    _NAME = "local"

    def __init__(self, job: JobSpec) -> None:
        self._job = job
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._hung = False
        self._fault = ""
        self._worker: Worker | None = None

    def resolve_precision(self) -> Resolved:
        return job_precision(self._job)

    def encode(self, plan: WorkerPlan, batches: Iterator[Sequence[str]]) -> Generator[Encoded]:
        worker, tries = None, TextTries(batches, plan.job.attempts)
        try:
            while (texts := tries.next()) is not None:
                done = Encoded()
                try:
                    if texts:
                        worker = worker or TextWorker(plan)
                        done = worker.encode(texts)
                        tries.done(0, texts)
                except Exception as error:
                    done = tries.raised(0, texts, error)
                yield done
        finally:
            if worker is not None:
                worker.close()

    def start(self, plan: WorkerPlan) -> None:
        try:
            self._worker = Worker(plan)
        except Exception as error:  # the same process would fail again
            self._events.put(StartFailed(self._NAME, f"{type(error).__name__}: {error}", permanent=True))
        else:
            self._events.put(Started(self._NAME, self._worker.describe()))

    def submit(self, worker: str, unit: WorkUnit) -> None:
        # A thread a unit, as many as the schedule hands out; daemons, so that a hung one cannot keep the process.
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=self._run, args=(worker, unit), daemon=True))
        self._threads[-1].start()

    def _run(self, worker: str, unit: WorkUnit) -> None:
        assert self._worker is not None
        try:
            self._events.put(Finished(worker, unit.id, self._worker.run(unit)))
        except BaseException as error:  # a worker answers with records, so this is a fault of the machinery
            self._fault = f"{type(error).__name__}: {error}"
            self._events.put(Died(worker, "crash", self._fault))

    def wait(self, timeout_s: float) -> list[Event]:
        try:
            events = [self._events.get(timeout=timeout_s)]
        except queue.Empty:
            return []
        while not self._events.empty():
            events.append(self._events.get())
        return events

    def kill(self, worker: str, reason: str) -> None:
        self._hung = True
        raise RunStopped(f"{reason}; this run has no process of its own for its worker (workers: 0), so it ends here")

    def restart(self, worker: str) -> None:
        raise RunStopped(f"the worker of this process (workers: 0) cannot go on: {self._fault}")

    def close(self) -> None:
        if self._hung:
            return
        for thread in self._threads:
            thread.join()
        if self._worker is not None:
            self._worker.close()
