"""The text phase on Ray: actors that load nothing but the text encoder, and are gone before any other actor starts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ltx_batch.errors import RunStopped
from ltx_batch.text_tries import TextTries
from ltx_batch.text_worker import Encoded, TextWorker
from ltx_batch.worker import WorkerPlan

_TEXTS_AN_ACTOR = 2048  # another actor, which loads gigabytes, is worth so many texts
_IN_FLIGHT = 2
_POLL_S = 0.5
_LEAVE_S = 60.0
DEVICE_LOST = "CUDA error"  # how torch begins the message of a fault that its process does not survive


class TextActor:
    """The actor's body."""

    def __init__(self, plan: WorkerPlan) -> None:
        self._plan = plan
        self._worker: TextWorker | None = None

    def encode(self, texts: Sequence[str]) -> Encoded:
        try:
            if self._worker is None:  # not in __init__, whose errors Ray reports as a death
                self._worker = TextWorker(self._plan)
            return self._worker.encode(texts)
        except Exception as error:
            if DEVICE_LOST in str(error):  # every later call would fail too: another actor takes the texts
                os._exit(70)
            raise


class TextCrew:
    """At most `slots` actors, the second when the first has had its share. `feel` raises RunStopped for a lost cluster."""

    def __init__(self, plan: WorkerPlan, resources: Mapping[str, float], slots: int, feel: Callable[[], None]) -> None:
        self._plan, self._resources, self._slots, self._feel = plan, resources, slots, feel
        self._actors: dict[int, Any] = {}
        self._refs: dict[Any, tuple[int, Sequence[str]]] = {}
        self._tries = TextTries(iter(()), plan.job.attempts)
        self._handed_texts = 0
        self._deaths = 0

    def encode(self, batches: Iterator[Sequence[str]]) -> Generator[Encoded]:
        """What was done, batch by batch, and nothing now and then, so that the caller can end it.

        Raises RunStopped where it cannot go on.
        """
        import ray

        self._tries = TextTries(batches, self._plan.job.attempts)
        try:
            while self._hand_out() or self._refs:
                done: list[Any] = []
                if self._refs:
                    done, _ = ray.wait(list(self._refs), num_returns=1, timeout=_POLL_S)
                if not done:
                    self._feel()
                    yield Encoded()
                for ref in done:
                    yield self._collect(ref)
        finally:
            self._dismiss()

    def _hand_out(self) -> bool:
        """Keep every actor busy; False when there is nothing more to hand out."""
        while (free := self._free_actor()) is not None:
            texts = self._tries.next()
            if not texts:
                return texts is not None
            actor = self._actors.get(free) or self._start(free)
            self._handed_texts += len(texts)
            self._refs[actor.encode.remote(texts)] = (free, texts)
        return True

    def _free_actor(self) -> int | None:
        """The number of an actor that can take more, or of one that may be started."""
        held = [number for number, _ in self._refs.values()]
        least = min(self._actors, key=held.count, default=None)
        if least is not None and held.count(least) < _IN_FLIGHT:
            return least
        wanted = min(self._slots, 1 + self._handed_texts // _TEXTS_AN_ACTOR)
        return next((number for number in range(wanted) if number not in self._actors), None)

    def _start(self, number: int) -> Any:
        import ray

        options = ray.remote(TextActor).options(**self._resources, max_restarts=0, max_task_retries=0)
        self._actors[number] = options.remote(self._plan)
        return self._actors[number]

    def _collect(self, ref: Any) -> Encoded:
        import ray

        number, texts = self._refs.pop(ref)
        try:
            result: Encoded = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            return self._tries.raised(number, texts, cause)
        except ray.exceptions.RayError as error:
            self._feel()
            self._bury(number, texts, error)
            return Encoded()
        self._deaths = 0
        self._tries.done(number, texts)
        return result

    def _bury(self, number: int, texts: Sequence[str], error: Exception) -> None:
        """An actor died: another one takes what it held."""
        import ray

        lost = [ref for ref, (holder, _) in self._refs.items() if holder == number]
        self._tries.lost([texts, *(self._refs.pop(ref)[1] for ref in lost)])
        with suppress(ray.exceptions.RayError):
            ray.kill(self._actors.pop(number))
        self._deaths += 1
        if self._deaths >= self._plan.job.attempts.max_worker_deaths:
            raise RunStopped(f"the text phase died too often (attempts.max_worker_deaths); the last: {error}")

    def _dismiss(self) -> None:
        """End all actors, and wait until they are gone: whoever comes next wants their memory."""
        import ray

        for actor in self._actors.values():
            ray.kill(actor)
        deadline_s = time.monotonic() + _LEAVE_S
        for actor in self._actors.values():
            with suppress(ray.exceptions.RayActorError):
                while time.monotonic() < deadline_s:
                    self._feel()
                    with suppress(ray.exceptions.GetTimeoutError):
                        ray.get(actor.__ray_ready__.remote(), timeout=1)
        self._actors.clear()
