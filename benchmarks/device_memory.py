"""What the driver counts: memory of a whole process on its GPUs, its CUDA context included."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_EVERY_S = 0.01


@dataclass(slots=True)
class DriverMemory:
    """Bytes in use on the GPUs that this process may see, beyond what was in use when this was made, which is to be before
    the process touches one: all else on them must be still. `peaks` are of the last `watched`, by GPU. On a machine without
    a GPU there is nothing to count."""

    peaks: list[int] = field(default_factory=list)
    _handles: list[object] = field(default_factory=list)
    _before: list[int] = field(default_factory=list)

    @classmethod
    def here(cls, *, on_gpu: bool) -> DriverMemory:
        if not on_gpu:
            return cls()
        import pynvml

        pynvml.nvmlInit()
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        numbers = map(int, seen.split(",")) if seen else range(pynvml.nvmlDeviceGetCount())
        made = cls(_handles=[pynvml.nvmlDeviceGetHandleByIndex(number) for number in numbers])
        made._before = made._used()
        return made

    def now(self) -> list[int]:
        return [used - before for used, before in zip(self._used(), self._before, strict=True)]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it, the peaks are noted. torch keeps what it took until a stage ends, so that none is too short to see."""
        self.peaks = self.now()
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(_EVERY_S):
            self.peaks = list(map(max, self.peaks, self.now()))

    def _used(self) -> list[int]:
        if not self._handles:
            return []
        import pynvml

        return [int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in self._handles]
