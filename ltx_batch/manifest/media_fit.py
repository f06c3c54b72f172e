"""Media of a manifest that lie on this machine: whether they can be read, and whether their clips can take them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from ltx_batch.errors import InvalidRow, MediaError
from ltx_batch.manifest.cells import Cells, Fault
from ltx_batch.manifest.media import INPUT, PATHS, inputs_of, paths_of
from ltx_batch.storage import is_local_uri, join_uri

MAX_OPENED: Mapping[str, int] = {"pictures": 10_000, "videos": 1_000}  # distinct files; others fail when rendered
_STARTS = "conditioning_start_frames"
_PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class MediaProbe(Protocol):
    """What knows of media and of the model: `frames` in a local file, and how many of them a clip takes, which raise
    MediaError and InvalidRow where it cannot."""

    def frames(self, path: str) -> int: ...
    def condition_frames(self, available: int, start_frame: int, num_frames: int) -> int: ...
    def input_frames(self, available: int, num_frames: int) -> int: ...


class MediaFit:
    """Opens each distinct file once, pictures and videos up to a limit each. Without a probe nothing is found.

    Whether pixels can be decoded to the end shows only when they are; media elsewhere are not opened.
    """

    def __init__(self, probe: MediaProbe | None, limits: Mapping[str, int] = MAX_OPENED) -> None:
        self._probe, self._limits = probe, limits
        self._frames: dict[str, int | str | None] = {}
        self._opened: Counter[str] = Counter()
        self.unopened = 0  # times that a file beyond a limit was named

    def told(self, cells: Cells, folder: str, num_frames: int) -> tuple[list[Fault], list[Fault]]:
        """Faults of rows whose media cannot be read, are too short for their clip or cannot stand at their frame, and doubts
        about sequences of which only a picture is taken. `num_frames` is what rows without their own have."""
        faults: list[Fault] = []
        doubts: list[Fault] = []
        if self._probe is None:
            return faults, doubts
        lengths = cells.numbers("num_frames", default=num_frames)
        placed = [one for one in _placed(cells, folder, lengths) if is_local_uri(one.uri)]
        self._open(self._probe, dict.fromkeys(one.uri for one in placed))
        for one in placed:
            fault, doubt = self._look_at(self._probe, one)
            faults += [] if fault is None else [fault]
            doubts += [] if doubt is None else [doubt]
        return faults, doubts

    def _look_at(self, probe: MediaProbe, one: _Placed) -> tuple[Fault | None, Fault | None]:
        """A fault, a doubt, or neither."""
        found = self._frames.get(one.uri)
        if found is None:
            return None, None
        if isinstance(found, str):
            return Fault(one.row, one.column, found), None
        try:
            taken = self._taken(probe, one, found)
        except (InvalidRow, MediaError) as error:
            column = _STARTS if isinstance(error, InvalidRow) else one.column
            return Fault(one.row, column, f"{one.uri}: {error}"), None
        if taken == 1 < min(found, one.num_frames):
            rule = f"of the {found} frames of {one.uri} the first is taken: sequences have 9, 17, 25 and so on"
            return None, Fault(one.row, one.column, rule)
        return None, None

    def _taken(self, probe: MediaProbe, one: _Placed, frames: int) -> int:
        if one.start_frame is None:
            return probe.input_frames(frames, one.num_frames)
        return probe.condition_frames(frames, one.start_frame, one.num_frames)

    def _open(self, probe: MediaProbe, uris: Iterable[str]) -> None:
        new = [uri for uri in uris if uri not in self._frames and self._may_open(uri)]
        if new:
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                self._frames |= dict(zip(new, threads.map(lambda uri: _count(probe, uri), new), strict=True))

    def _may_open(self, uri: str) -> bool:
        kind = "pictures" if uri.lower().endswith(_PICTURES) else "videos"
        may = self._opened[kind] < self._limits[kind]
        self._opened[kind] += may
        self.unopened += not may
        return may


@dataclass(frozen=True, slots=True)
class _Placed:
    """A medium of a row, and where in its clip; `start_frame` None: it is what the clip begins from."""

    row: int
    column: str
    uri: str
    start_frame: int | None
    num_frames: int


def _placed(cells: Cells, folder: str, lengths: NDArray[Any]) -> Iterator[_Placed]:
    """Media of the rows without faults in the columns that they hang on."""
    sound = ~cells.bad("num_frames", _STARTS)
    starts = cells.array(_STARTS).to_pylist() if PATHS in cells else []
    places: Counter[int] = Counter()
    for row, _, path in paths_of(cells):
        if sound[row]:
            yield _Placed(row, PATHS, join_uri(folder, path), starts[row][places[row]], int(lengths[row]))
            places[row] += 1
    for row, _, path in inputs_of(cells):
        if sound[row]:
            yield _Placed(row, INPUT, join_uri(folder, path), None, int(lengths[row]))


def _count(probe: MediaProbe, uri: str) -> int | str | None:
    """Frames, or why there are none; None for a file that is not there, which is told elsewhere."""
    path = uri.removeprefix("file://")
    try:
        return probe.frames(path) if Path(path).exists() else None
    except MediaError as error:
        return str(error)
