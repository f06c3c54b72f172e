"""Which unit next, and what a failure means. Pure: no clock, no store, no process; every rule is tested as a table.

    ready ──next()──> in flight ──finished()──> done | again, alone | failed
                          └──────died()───────> again, alone | failed

Two rules carry the rest. A row is charged only for what it did alone: whatever a worker held when it died runs again
uncharged with a worker to itself, and whatever shared a batch that raised runs again by itself. And ok wins: `committed` is asked for
a record before anything is charged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ltx_batch.costs import CostModel
from ltx_batch.errors import NotFinite
from ltx_batch.job import AttemptPolicy
from ltx_batch.record import RenderRecord
from ltx_batch.request import RenderRequest

Cause = Literal["crash", "timeout", "preempted"]
Committed = Callable[[str], RenderRecord | None]


@dataclass(frozen=True, slots=True)
class Task:
    """One request to render. `attempt` counts from 1 over all drivers of a run's epoch."""

    key: str
    request: RenderRequest
    priority: int = 0
    attempt: int = 1
    failed_on: tuple[str, ...] = ()  # workers on which it raised: another one goes first
    unquantised: bool = False  # its numbers overflowed: from now on it is rendered in 16 bits or more


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """What a worker is handed at once: tasks of one batch key. An `alone` unit shares its worker with no other."""

    id: int
    tasks: tuple[Task, ...]
    alone: bool = False

    @property
    def priority(self) -> int:
        return max(task.priority for task in self.tasks)

    @property
    def batch_key(self) -> tuple[Any, ...]:
        return self.tasks[0].request.batch_key()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an event settled: rows that ended, and attempts to write down (key and facts)."""

    records: tuple[RenderRecord, ...] = ()
    attempts: tuple[tuple[str, dict[str, Any]], ...] = ()

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(self.records + other.records, self.attempts + other.attempts)


def cut_units(tasks: Iterable[Task], batch_size: int, *, first_id: int = 0) -> list[WorkUnit]:
    """Group tasks by batch key in manifest order and cut groups into units of at most `batch_size`."""
    groups: dict[tuple[Any, ...], list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.request.batch_key(), []).append(task)
    cuts = [group[i : i + batch_size] for group in groups.values() for i in range(0, len(group), batch_size)]
    return [WorkUnit(first_id + i, tuple(cut)) for i, cut in enumerate(cuts)]


@dataclass(slots=True)
class _Slot:
    """A worker's place: what it holds, oldest first, and how it has fared."""

    held: dict[int, WorkUnit] = field(default_factory=dict)
    progress_s: float = 0.0
    batch_key: tuple[Any, ...] | None = None
    unexplained_deaths: int = 0
    raised: set[str] = field(default_factory=set)  # keys that raised here since the last ok
    ready: bool = False
    retired: bool = False


class Schedule:
    """The state machine between the manifest and the pool.

    `in_flight` units are handed to a worker at most: one renders, the others are fetched or uploaded meanwhile.
    `committed` looks a key's record up in the ledger.
    """

    def __init__(self, policy: AttemptPolicy, committed: Committed, *, in_flight: int = 2) -> None:
        self.policy = policy
        self._committed = committed
        self.costs = CostModel()
        self._in_flight = in_flight
        self._ready: dict[tuple[Any, ...], list[WorkUnit]] = {}
        self._again: list[WorkUnit] = []
        self._alone: list[WorkUnit] = []
        self._slots: dict[str, _Slot] = {}
        self._reserved: str | None = None
        self._deaths: Counter[str] = Counter()
        self._next_id = 0

    # what is left

    @property
    def waiting(self) -> int:
        """Tasks not handed out yet."""
        return (
            len(self._alone)
            + len(self._again)
            + sum(len(unit.tasks) for group in self._ready.values() for unit in group)
        )

    @property
    def busy(self) -> int:
        """Tasks in workers' hands."""
        return sum(len(unit.tasks) for slot in self._slots.values() for unit in slot.held.values())

    @property
    def stranded(self) -> bool:
        """True when every worker slot was given up."""
        return bool(self._slots) and all(slot.retired for slot in self._slots.values())

    def waiting_s(self) -> float:
        """Predicted seconds of one worker for all that waits."""
        units = [*self._alone, *self._again, *(unit for group in self._ready.values() for unit in group)]
        return sum(self._cost(unit) for unit in units)

    # tasks in

    def add(self, tasks: Iterable[Task], batch_size: int = 1) -> None:
        """Queue tasks; within a batch key the higher priority goes first, then the manifest's order."""
        units = cut_units(tasks, batch_size, first_id=self._next_id)
        self._next_id += len(units)
        for unit in units:
            self._ready.setdefault(unit.batch_key, []).append(unit)
        for key in {unit.batch_key for unit in units}:
            self._ready[key].sort(key=lambda unit: -unit.priority)

    # workers

    def started(self, worker: str) -> None:
        """A worker is ready for units."""
        self._slots.setdefault(worker, _Slot()).ready = True

    @property
    def ready_workers(self) -> list[str]:
        return [name for name, slot in self._slots.items() if slot.ready]

    def next(self, worker: str, now_s: float) -> WorkUnit | None:
        """The unit that `worker` should get now, or None: it is full, must run dry first, or nothing waits."""
        slot = self._slots[worker]
        if not slot.ready or len(slot.held) >= self._in_flight or any(unit.alone for unit in slot.held.values()):
            return None
        if self._wants_alone(worker):
            unit = self._next_alone(worker, slot)
        else:
            unit = self._next_again(worker) or self._next_ready(slot)
        if unit is None:
            return None
        if not slot.held:
            slot.progress_s = now_s
        slot.held[unit.id] = unit
        slot.batch_key = unit.batch_key
        return unit

    def overdue(self, now_s: float) -> list[str]:
        """Workers that made no progress for longer than their oldest unit may take."""
        return [
            name
            for name, slot in self._slots.items()
            if slot.held and now_s - slot.progress_s > self._timeout_s(next(iter(slot.held.values())))
        ]

    # events

    def finished(self, worker: str, unit_id: int, records: Iterable[RenderRecord], now_s: float) -> Verdict:
        """A unit came back with a record for each of its tasks, in order."""
        slot = self._slots[worker]
        unit = slot.held.pop(unit_id)
        slot.progress_s = now_s
        verdict = Verdict()
        for task, record in zip(unit.tasks, records, strict=True):
            if record.ok:
                slot.unexplained_deaths, slot.raised = 0, set()
                verdict += self._succeed(task, record)
            else:
                if record.retryable:
                    slot.raised.add(task.key)
                verdict += self._raised(task, record, worker, shared=len(unit.tasks) > 1)
        return verdict

    def died(self, worker: str, cause: Cause, message: str) -> Verdict:
        """A worker's process ended, or was killed for making no progress."""
        slot = self._slots.setdefault(worker, _Slot())
        held, slot.held, slot.batch_key, slot.ready = list(slot.held.values()), {}, None, False
        slot.raised = set()
        if self._reserved == worker:
            self._reserved = None
        tasks = [task for unit in held for task in unit.tasks]
        verdict, lost = Verdict(), []
        for task in tasks:
            record = self._committed(task.key)
            if record is not None:
                verdict += self._succeed(task, record)
            else:
                lost.append(task)
        if cause == "preempted":
            self.add(lost)
            return verdict
        if len(tasks) == 1 and lost:
            return self._charge_death(lost[0], cause, message, worker)
        slot.unexplained_deaths += 1
        self._run_alone(lost)
        return verdict + Verdict(
            attempts=tuple((task.key, _facts(task, cause, message, worker, False)) for task in lost)
        )

    def failed_start(self, worker: str) -> None:
        """A worker's process could not be made ready."""
        self._slots.setdefault(worker, _Slot()).unexplained_deaths += 1

    def sick(self, worker: str) -> bool:
        """Whether rows raise on this worker one after the other while another worker could take them."""
        others = [name for name in self.ready_workers if name != worker and not self._slots[name].raised]
        return bool(others) and len(self._slots[worker].raised) >= self.policy.max_worker_deaths

    def may_restart(self, worker: str) -> bool:
        """Whether the slot gets a new process; one that is refused stays closed for the run."""
        slot = self._slots[worker]
        slot.retired = slot.unexplained_deaths >= self.policy.max_worker_deaths
        return not slot.retired

    def retire(self, worker: str) -> None:
        """Close the slot for the run."""
        self._slots.setdefault(worker, _Slot()).retired = True

    def withdraw(self) -> int:
        """Forget all that waits (the run is draining); returns how many tasks that were."""
        count = self.waiting
        self._ready.clear()
        self._again.clear()
        self._alone.clear()
        return count

    # choices

    def _wants_alone(self, worker: str) -> bool:
        """Alone units need an empty worker: one worker at a time is kept from new work until it is empty."""
        if not self._alone:
            return False
        if self._reserved is None or self._slots[self._reserved].retired:
            self._reserved = worker
        return self._reserved == worker or not self._slots[worker].held

    def _next_alone(self, worker: str, slot: _Slot) -> WorkUnit | None:
        if slot.held:
            return None
        if self._reserved == worker:
            self._reserved = None
        return self._alone.pop(0)

    def _next_again(self, worker: str) -> WorkUnit | None:
        """A row that raised, on a worker where it did not raise yet, while there is one."""
        for index, unit in enumerate(self._again):
            failed_on = unit.tasks[0].failed_on
            if worker not in failed_on or set(self.ready_workers) <= set(failed_on):
                return self._again.pop(index)
        return None

    def _next_ready(self, slot: _Slot) -> WorkUnit | None:
        """Highest priority; then the worker's own shape, whose graph is hot; then the longest predicted."""
        if not self._ready:
            return None
        heads = {key: group[0] for key, group in self._ready.items()}
        best = max(
            heads,
            key=lambda key: (heads[key].priority, key == slot.batch_key, self._cost(heads[key])),
        )
        unit = self._ready[best].pop(0)
        if not self._ready[best]:
            del self._ready[best]
        return unit

    def _cost(self, unit: WorkUnit) -> float:
        return self.costs.predict_s(unit.tasks[0].request) * len(unit.tasks)

    def _timeout_s(self, unit: WorkUnit) -> float:
        if self.policy.timeout_s is not None:
            return self.policy.timeout_s
        return max(600.0, 10 * self._cost(unit)) if self.costs.learned else 3600.0

    # outcomes

    def _succeed(self, task: Task, record: RenderRecord) -> Verdict:
        if not record.reused and (seconds := record.timings.get("render")):
            self.costs.observe(task.request, seconds)
        self._deaths.pop(task.key, None)
        return Verdict((record,))

    def _raised(self, task: Task, record: RenderRecord, worker: str, *, shared: bool) -> Verdict:
        committed = self._committed(task.key)
        if committed is not None:
            return self._succeed(task, replace(committed, reused=True))
        if shared and record.retryable:
            self.add([task])
            return Verdict()
        facts = _facts(task, record.error_class or "error", record.error or "", record.worker or "", True)
        attempts = ((task.key, facts),)
        if record.retryable and task.attempt < self.policy.max_attempts:
            again = replace(
                task,
                attempt=task.attempt + 1,
                failed_on=(*task.failed_on, worker),
                unquantised=task.unquantised or record.error_class == NotFinite.__name__,
            )
            self._again.append(WorkUnit(self._next_id, (again,)))
            self._next_id += 1
            return Verdict(attempts=attempts)
        return Verdict((replace(record, attempts=task.attempt),), attempts)

    def _charge_death(self, task: Task, cause: Cause, message: str, worker: str) -> Verdict:
        self._deaths[task.key] += 1
        attempts = ((task.key, _facts(task, cause, message, worker, True)),)
        if self._deaths[task.key] < self.policy.max_deaths and task.attempt < self.policy.max_attempts:
            self._run_alone([replace(task, attempt=task.attempt + 1)])
            return Verdict(attempts=attempts)
        del self._deaths[task.key]
        error_class = "RowTimeout" if cause == "timeout" else "WorkerDied"
        record = RenderRecord(
            key=task.key,
            status="failed",
            attempts=task.attempt,
            error_class=error_class,
            error=message,
            worker=worker,
        )
        return Verdict((record,), attempts)

    def _run_alone(self, tasks: Iterable[Task]) -> None:
        for task in tasks:
            self._alone.append(WorkUnit(self._next_id, (task,), alone=True))
            self._next_id += 1


def _facts(task: Task, cause: str, message: str, worker: str, charged: bool) -> dict[str, Any]:
    return {
        "attempt": task.attempt,
        "cause": cause,
        "charged": charged,
        "error": message,
        "worker": worker,
    }


@dataclass(frozen=True, slots=True)
class Breaker:
    """Stops a run that cannot work: too many failures before the first ok, or too large a share of them."""

    stop_after_failures: int
    max_failed_fraction: float | None = None

    def tripped(self, ok: int, failed: int) -> str | None:
        """The reason to stop, or None."""
        if ok == 0 and failed >= self.stop_after_failures:
            return f"{failed} rows failed before the first one succeeded (stop_after_failures)"
        share = self.max_failed_fraction
        if share is not None and ok + failed >= 100 and failed / (ok + failed) > share:
            return f"{failed} of {ok + failed} rows failed, more than max_failed_fraction {share:g}"
        return None
