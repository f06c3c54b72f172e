"""One thread that makes calls in turn, for what wants to be called from the same thread each time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class OneThread:
    """Unlike an executor's thread this one is a daemon: a call that hangs does not keep the process alive."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def call(self, function: Callable[[], T]) -> T:
        """What the function returns or raises, once its turn has come. From any other thread."""
        future: Future[T] = Future()
        self._calls.put((future, function))
        try:
            return future.result()
        finally:
            del future  # it holds the error, whose traceback holds this frame: what failed would live until gc comes by

    def close(self) -> None:
        """End the thread after the calls that wait. No call may follow."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self._turn(*call)
            del call  # nothing of it is held while the next one is awaited

    @staticmethod
    def _turn(future: Future[Any], function: Callable[[], Any]) -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
        finally:
            del future, function  # as in `call`
