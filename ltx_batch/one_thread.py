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
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def call(self, function: Callable[[], T]) -> T:
        """What the function returns or raises, once its turn has come. From any other thread."""
        future: Future[T] = Future()
        self._calls.put((future, function))
        return future.result()

    def _work(self) -> None:
        while True:
            self._turn(*self._calls.get())

    @staticmethod
    def _turn(future: Future[Any], function: Callable[[], Any]) -> None:
        """In a frame of its own, so that nothing of a call is held while the next one is awaited."""
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)
