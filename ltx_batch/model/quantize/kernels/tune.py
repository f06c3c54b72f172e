"""Which launch of a kernel is fastest here: timed on first use, kept in memory, and on disk for later processes.

Choices change how long a kernel takes and never one bit of what it computes: integer sums are exact in any order, and
where fractions are added up the order is the same for every candidate. So machines may choose differently.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Generic, Protocol, TypeVar

import torch
import triton
from triton.runtime import driver

from ltx_batch.errors import PrecisionError
from ltx_batch.model.quantize.kernels.start import building, only_building
from ltx_batch.model.quantize.kernels.store import read_choice, write_choice

log = logging.getLogger(__name__)

_WARM_UP, _REPEATS, _ROUNDS = 2, 5, 3
_AHEAD_CYCLES = 4_000_000  # some 2 ms
_COMPARED = 1024  # rows, of tens of thousands at most
_SAME = 1e-3  # relative; right candidates agree to the last bit, wrong ones in none


class Launch(Protocol):
    """A frozen dataclass of numbers."""

    def shared_bytes(self, capability: tuple[int, int]) -> int:
        """Shared memory that a program needs, at most, on a GPU of this compute capability."""
        ...


Choice = TypeVar("Choice", bound=Launch)


class Tuner(Generic[Choice]):
    """The choices of one kernel. `candidates` are tried in order; the first is what others are checked against."""

    def __init__(self, kernel: str, candidates: Sequence[Choice]) -> None:
        self._kernel, self._candidates = kernel, tuple(candidates)
        self._chosen: dict[tuple[int | None, tuple[int, ...]], Choice] = {}

    def choose(
        self,
        device: torch.device,
        shape: tuple[int, ...],
        run: Callable[[Choice], torch.Tensor],
    ) -> Choice:
        """The fastest candidate for `shape` on this GPU; `run` launches one and returns what it computes.

        Within `only_building` all are compiled of which one must be chosen yet. Raises PrecisionError where none runs.
        """
        if device.type != "cuda":  # Triton's interpreter
            return self._candidates[0]
        found = self._chosen.get((device.index, shape))
        if found is None:
            name = "x".join(map(str, shape))
            found = self._recall(device, name)
            if found is None and building():
                return self._build(device, run)
            found = found or self._time(device, name, run)
            self._chosen[device.index, shape] = found
        return found

    def fitting(self, capability: tuple[int, int], limit_bytes: int) -> list[Choice]:
        """The candidates for a GPU of this compute capability, with that much shared memory a program: 227 KiB on Hopper,
        163 on an A100, 99 on GeForce cards."""
        return [one for one in self._candidates if one.shared_bytes(capability) <= limit_bytes]

    def _recall(self, device: torch.device, shape: str) -> Choice | None:
        stored = read_choice(store_path(device), self._kernel, shape)
        return next((one for one in self._candidates if _numbers(one) == stored), None)

    def _build(self, device: torch.device, run: Callable[[Choice], torch.Tensor]) -> Choice:
        fitting = self.fitting(*limits(device)) or self._candidates
        built: list[Choice] = []
        for one in fitting:
            with suppress(Exception):  # it comes again when that one is run
                run(one)
                built.append(one)
        return (built or fitting)[0]

    def _time(self, device: torch.device, shape: str, run: Callable[[Choice], torch.Tensor]) -> Choice:
        expected: torch.Tensor | None = None
        right: list[Choice] = []
        faults: list[str] = []
        with only_building():
            self._build(device, run)
        for one in self.fitting(*limits(device)):
            try:
                found = run(one)
                some = _some_rows(found)
                expected = some if expected is None else expected
                same = _same(some, expected)
                found.zero_()  # the next one may write to the same memory
                if not same:
                    faults.append(f"{one} computes something else")
                    continue
                right.append(one)
            except torch.OutOfMemoryError:  # says nothing of the kernel: a render goes on with less at once
                raise
            except Exception as error:  # a compiler's limits show only when it is asked
                faults.append(f"{one}: {type(error).__name__}: {error}")
        if not right:
            raise PrecisionError(f"no launch of {self._kernel} runs on this GPU; use precision bf16. {faults[:3]}")
        for fault in faults:
            log.warning("%s %s: %s", self._kernel, shape, fault)
        # In turns: what is fastest on a cool GPU may not be on one that is held to its power, as a long render is.
        rounds = [{one: median_s(lambda one=one: run(one), device) for one in right} for _ in range(_ROUNDS)]  # type: ignore[misc]
        times_s = {one: median(times[one] for times in rounds) for one in right}
        best = min(times_s, key=times_s.__getitem__)
        log.info("%s %s: %s, %.3f ms", self._kernel, shape, best, 1000 * times_s[best])
        log.debug("%s %s: %s", self._kernel, shape, _told(times_s))
        write_choice(store_path(device), self._kernel, shape, _numbers(best))
        return best


def limits(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and bytes of shared memory that a program may have."""
    limit_bytes: int = driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return torch.cuda.get_device_capability(device), limit_bytes


def median_s(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call on the GPU."""
    for _ in range(_WARM_UP):
        run()
    torch.cuda._sleep(_AHEAD_CYCLES)  # so that launches lie ready, and their making is not what is timed
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_REPEATS + 1)]
    for mark in marks[:-1]:
        mark.record()
        run()
    marks[-1].record()
    torch.cuda.synchronize(device)
    return median(one.elapsed_time(two) for one, two in pairwise(marks)) / 1000


def bucket(rows: int) -> int:
    """Rows to the next power of two: shapes that share a choice."""
    return 1 << (rows - 1).bit_length()


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def store_path(device: torch.device) -> Path:
    """Choices hold for one GPU model and one compiler."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    gpu = torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")
    return root / "ltx_batch" / "kernels" / f"{gpu}-triton-{triton.__version__}.json"


def _some_rows(found: torch.Tensor) -> torch.Tensor:
    """A copy of rows of every tile: a copy of all would be memory that a render on a small card has not."""
    return found[:: max(1, len(found) // _COMPARED)].clone()


def _same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (found.float() - expected.float()).norm()
    return bool(error <= _SAME * expected.float().norm())


def _told(times_s: Mapping[Any, float]) -> str:
    return ", ".join(f"{one} {1000 * s:.3f} ms" for one, s in sorted(times_s.items(), key=lambda item: item[1]))


def _numbers(choice: Any) -> dict[str, int]:
    return json.loads(json.dumps(asdict(choice)))
