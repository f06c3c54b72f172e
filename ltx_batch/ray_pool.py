"""RayPool: one Ray actor a slot. Ray Core actors and our own schedule, not Ray Data: rows last minutes, differ in
length, and must commit and fail one by one."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ltx_batch.errors import JobError, RunStopped, UsageError
from ltx_batch.job import JobSpec
from ltx_batch.model.quantize.policy import Resolved
from ltx_batch.pool import Died, Event, Finished, Started, StartFailed
from ltx_batch.ray_text import DEVICE_LOST, TextCrew
from ltx_batch.recipe import job_precision
from ltx_batch.schedule import WorkUnit
from ltx_batch.text_worker import Encoded
from ltx_batch.worker import Worker, WorkerPlan

_LOCAL_OBJECT_STORE_BYTES = 128 * 2**20  # records and requests only: no video goes through the object store
_FATE_S = 60.0  # how long to ask why an actor is out of reach
_PLACED, _READY = -2, -1  # in place of a unit's id: the actor has a process; its model is loaded


class RenderActor:
    """The actor's body: a Worker, or the reason why there is none."""

    def __init__(self, plan: WorkerPlan) -> None:
        self._plan = plan
        self._worker: Worker | None = None

    def load(self) -> dict[str, Any]:
        self._worker = Worker(self._plan)
        return self._worker.describe()

    def run(self, unit: WorkUnit) -> list[Any]:
        assert self._worker is not None
        records = self._worker.run(unit)
        if any(record.error and DEVICE_LOST in record.error for record in records):
            # After a fault on the GPU every later call of its process fails too: end it, and let the death be judged.
            os._exit(70)
        return records


class RayPool:
    """Actors with whole or fractional GPUs, or CPUs. Connects to RAY_ADDRESS, else starts Ray on this machine."""

    def __init__(self, job: JobSpec) -> None:
        self._job = job
        self._actors: dict[str, Any] = {}
        self._refs: dict[Any, tuple[str, int]] = {}
        self._started_s: dict[str, float] = {}
        self._plan: WorkerPlan | None = None
        self._own_connection = connect()
        self.nodes = _alive_nodes()
        self._pulse = _Pulse()
        self._resources = _resources(job)
        self.slots = tuple(f"actor-{i}" for i in range(_count(job, self._resources)))

    def resolve_precision(self) -> Resolved:
        import ray

        if self._job.model.precision != "auto":
            return job_precision(self._job)
        probe = ray.remote(job_precision).options(**self._resources, max_retries=3)
        return Resolved(*ray.get(probe.remote(self._job)))

    def encode(self, plan: WorkerPlan, batches: Iterator[Sequence[str]]) -> Generator[Encoded]:
        crew = TextCrew(plan, self._resources, len(self.slots), self._pulse.feel_now_and_then)
        return crew.encode(batches)

    def start(self, plan: WorkerPlan) -> None:
        self._plan = plan
        for slot in self.slots:
            self.restart(slot)

    def restart(self, worker: str) -> None:
        import ray

        # One more thread than units, so that a call that asks for nothing heavy never waits for a render.
        actor_class = ray.remote(RenderActor).options(
            **self._resources, max_restarts=0, max_task_retries=0, max_concurrency=self._job.worker.in_flight + 1
        )
        actor = actor_class.remote(self._plan)
        self._actors[worker] = actor
        self._refs[actor.__ray_ready__.remote()] = (worker, _PLACED)

    def submit(self, worker: str, unit: WorkUnit) -> None:
        self._refs[self._actors[worker].run.remote(unit)] = (worker, unit.id)

    def wait(self, timeout_s: float) -> list[Event]:
        import ray

        if not self._refs:
            time.sleep(timeout_s)
            return []
        done, rest = ray.wait(list(self._refs), num_returns=1, timeout=timeout_s)
        if done and rest:
            done += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        if not done:
            self._pulse.feel_now_and_then()
        return [event for ref in done for event in self._collect(ref)] + self._overdue_starts()

    def kill(self, worker: str, reason: str) -> None:
        self._end(worker)

    def close(self) -> None:
        import ray

        with suppress(RunStopped):
            for worker in list(self._actors):
                self._end(worker)
        if self._own_connection:
            ray.shutdown()

    def _collect(self, ref: Any) -> list[Event]:
        import ray

        if ref not in self._refs:  # another call of the same actor reported its death already
            return []
        worker, unit = self._refs.pop(ref)
        try:
            result = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            self._end(worker)
            if unit == _READY:
                message = f"{type(error.cause).__name__}: {error.cause}"
                return [StartFailed(worker, message, isinstance(error.cause, UsageError))]
            return [Died(worker, "crash", str(error))]
        except ray.exceptions.RayError as told:
            self._pulse.feel()
            fate = self._fate(worker, told)
            self._end(worker)
            return [_death(worker, fate, starting=unit in (_PLACED, _READY))]
        if unit == _PLACED:
            self._started_s[worker] = time.monotonic()
            self._refs[self._actors[worker].load.remote()] = (worker, _READY)
            return []
        return [Started(worker, result) if unit == _READY else Finished(worker, unit, result)]

    def _fate(self, worker: str, error: Exception) -> Exception:
        """Why an actor is out of reach. A broken connection is told at once, a lost node only when Ray has missed it
        for some 15 s: and it makes the difference between a preempted row and one that ends its process."""
        import ray

        deadline_s = time.monotonic() + _FATE_S
        while isinstance(error, ray.exceptions.ActorUnavailableError) and time.monotonic() < deadline_s:
            try:
                ray.get(self._actors[worker].__ray_ready__.remote(), timeout=5)
                return error  # it lives: the network failed, and what it held is lost all the same
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError as later:
                error = later
                time.sleep(0.5)
        return error

    def _overdue_starts(self) -> list[Event]:
        """Actors whose model does not get loaded. One that still waits for a place in the cluster is well."""
        events: list[Event] = []
        limit_s = self._job.worker.start_timeout_s
        for worker, unit in list(self._refs.values()):
            if unit == _READY and time.monotonic() - self._started_s[worker] > limit_s:
                self._end(worker)
                events.append(StartFailed(worker, f"not ready after {limit_s:g} s (worker.start_timeout_s)", False))
        return events

    def _end(self, worker: str) -> None:
        """Kill a slot's actor. Without a cluster the call would wait for its answer until Ray ends this process."""
        import ray

        if self._pulse.lost:
            return
        self._pulse.feel()
        self._refs = {ref: place for ref, place in self._refs.items() if place[0] != worker}
        actor = self._actors.pop(worker, None)
        if actor is not None:
            ray.kill(actor)


def connect() -> bool:
    """Connect to the Ray of RAY_ADDRESS, or start one here. True: it is ours to shut down."""
    import ray

    if ray.is_initialized():
        return False
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _init()
    except SystemExit:  # ray.init puts its own handler there, which leaves with code 15
        raise RunStopped("ended by a signal while Ray started; the same command again goes on") from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
    return True


def _init() -> None:
    import ray

    if address := os.environ.get("RAY_ADDRESS"):
        check_address(os.environ)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    else:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
        )


def check_address(environment: Mapping[str, str]) -> None:
    """Raises JobError where RAY_ADDRESS holds the job API's address, which a driver cannot connect to."""
    address = environment.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise JobError(
            f"RAY_ADDRESS={address} is the address of Ray's job API, and this driver runs here: unset RAY_ADDRESS and "
            f"hand the job over with `python submit.py JOB.yaml --address {address}`"
        )


class _Pulse:
    """Whether the cluster lives. Ray itself waits for ever for a lost raylet, and a minute for a lost head (GCS), after
    which it ends the driver's process: with code 1, which would say that rows failed."""

    _OFTEN_S = 1.0

    def __init__(self) -> None:
        import ray

        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._head = (host.strip("[]"), int(port))
        # A head of our own never comes back; another's may be restarted by its keepers.
        self._patience_s = 40.0 if "RAY_ADDRESS" in os.environ else 3.0
        self._last_s = 0.0
        self.lost = False

    def feel(self) -> None:
        """Returns when there is a sign of life; raises RunStopped when there is none for too long."""
        started_s = time.monotonic()
        while not self._beats():
            if time.monotonic() - started_s > self._patience_s:
                self.lost = True
                raise RunStopped("the Ray cluster is gone; the same command again goes on with what is left")
            time.sleep(self._OFTEN_S)

    def feel_now_and_then(self) -> None:
        if time.monotonic() - self._last_s > self._OFTEN_S:
            self._last_s = time.monotonic()
            self.feel()

    def _beats(self) -> bool:
        try:
            with socket.create_connection(self._head, timeout=2):
                return _alive_nodes() > 0
        except OSError:
            return False


def _alive_nodes() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes())


def _resources(job: JobSpec) -> dict[str, float]:
    import ray

    gpus = job.worker.num_gpus
    if gpus is None:
        use_gpu = job.model.device != "cpu" and job.model.renderer != "fake"
        gpus = 1 if use_gpu and ray.cluster_resources().get("GPU", 0) >= 1 else 0
    wanted = {"num_cpus": job.worker.num_cpus, "num_gpus": gpus}
    if "RAY_ADDRESS" not in os.environ:  # a cluster may grow, this machine does not: nobody would ever be placed
        here = {"num_cpus": ray.cluster_resources().get("CPU", 0), "num_gpus": ray.cluster_resources().get("GPU", 0)}
        for name, count in wanted.items():
            if count > here[name]:
                raise JobError(f"worker.{name} is {count:g}, and this machine has {here[name]:g}; ask for less")
    return wanted


def _count(job: JobSpec, resources: Mapping[str, float]) -> int:
    import ray

    if job.workers != "auto":
        return int(job.workers)
    cluster = ray.cluster_resources()
    kind, name = ("GPU", "num_gpus") if resources["num_gpus"] else ("CPU", "num_cpus")
    return max(1, int(cluster.get(kind, 0) / resources[name]))


def _death(worker: str, error: Exception, *, starting: bool) -> Event:
    """A lost node, a lost connection or a preemption is nobody's fault; any other death is a crash."""
    import ray

    told = str(error).strip()
    lost = isinstance(error, ray.exceptions.NodeDiedError | ray.exceptions.ActorUnavailableError)
    if lost or getattr(error, "preempted", False) or "node has died" in told.lower():
        return Died(worker, "preempted", told)
    detail = re.search(r"Worker exit detail: (.+?)(?: Some common causes|$)", told, re.DOTALL)
    reason = detail[1] if detail else told
    message = f"the process ended: out of memory, a crash such as a segfault, or an exit (Ray says: {reason})"
    return StartFailed(worker, message, False) if starting else Died(worker, "crash", message)
