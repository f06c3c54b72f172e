"""The rows of two runs, side by side: which pairs there are, and why the others are none."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ltx_batch.ledger import Ledger
from ltx_batch.quality.clips import NO_QUALITY, ClipQuality

JoinedBy = Literal["row_id", "content", "place"]
Reason = Literal["only in A", "only in B", "failed", "unreadable", "differs"]

_CONTENT = ("prompt", "negative_prompt", "seed", "height", "width", "num_frames")
_COLUMNS = (
    "row_id",
    *_CONTENT,
    "ltx_row",
    "ltx_status",
    "ltx_video",
    "ltx_frames_sha256",
    "ltx_error_class",
    "ltx_error",
)


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a finished shard. `file` and `row` are its place in the manifest, both from 0."""

    file: int
    row: int
    values: dict[str, Any]

    @property
    def row_id(self) -> str | None:
        found = self.values.get("row_id")
        return None if found is None else str(found)

    @property
    def ok(self) -> bool:
        return bool(self.values["ltx_status"] == "ok")

    @property
    def error(self) -> str:
        return f"{self.values['ltx_error_class']}: {(self.values['ltx_error'] or '').partition(chr(10))[0]}"


@dataclass(frozen=True, slots=True)
class Pair:
    """A row as each run has it; None where a run has no line for it."""

    a: Line | None
    b: Line | None

    @property
    def known(self) -> Line:
        line = self.a or self.b
        assert line is not None
        return line

    @property
    def name(self) -> str:
        """What the row is called in tables: its row_id, else its place in the manifest."""
        line = self.known
        if line.row_id is not None:
            return line.row_id
        return f"file {line.file} row {line.row}" if line.file else f"row {line.row}"

    @property
    def videos(self) -> tuple[str, str]:
        """Their names below A's and B's output, of a pair without a fault."""
        assert self.a is not None and self.b is not None
        return self.a.values["ltx_video"], self.b.values["ltx_video"]

    @property
    def same_frames(self) -> bool | None:
        """Whether the frames were equal before they were encoded, by their hashes."""
        hashes = [line.values["ltx_frames_sha256"] for line in (self.a, self.b) if line is not None]
        return None if len(hashes) < 2 or None in hashes else hashes[0] == hashes[1]

    def fault(self) -> tuple[Reason, str] | None:
        """Why there is nothing to compare, as far as the lines tell."""
        if self.a is None:
            return "only in B", "A has no finished line for it"
        if self.b is None:
            return "only in A", "B has no finished line for it"
        failed = [f"in {name}: {line.error}" for name, line in (("A", self.a), ("B", self.b)) if not line.ok]
        return ("failed", "; ".join(failed)) if failed else None


@dataclass(frozen=True, slots=True)
class RowQuality:
    """What came of one row: its quality, or the reason why there is none and the detail of it."""

    pair: Pair
    quality: ClipQuality | None = None
    reason: Reason | None = None
    detail: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """A flat line. Places are from 0, videos are below the runs' outputs, the metrics as `ClipQuality.as_dict`."""
        line: dict[str, Any] = {"row_id": self.pair.known.row_id, "prompt": self.pair.known.values["prompt"]}
        for side, of in (("a", self.pair.a), ("b", self.pair.b)):
            line[f"file_{side}"] = None if of is None else of.file
            line[f"row_{side}"] = None if of is None else of.row
            line[f"video_{side}"] = None if of is None else of.values["ltx_video"]
        line |= {"same_frames": self.pair.same_frames, "reason": self.reason, "detail": self.detail}
        return {**line, **(NO_QUALITY if self.quality is None else self.quality.as_dict())}


def read_run(ledger: Ledger, run: str) -> list[Line]:
    """All rows of a run's finished shards, in the manifest's order."""
    lines = []
    for shard, epoch in sorted(ledger.finished_shards(run).items()):
        table = ledger.read_shard(run, shard, epoch, list(_COLUMNS))
        file = int(shard.partition("-")[0])
        lines += [Line(file, values["ltx_row"], values) for values in table.to_pylist()]
    return lines


def join(a: Sequence[Line], b: Sequence[Line]) -> tuple[JoinedBy, list[Pair]]:
    """Pair rows by `row_id` where both runs have one in each row; else rows of equal prompts, seed and size, the first
    of several with the first; and where no two are equal, rows of equal prompt at the same place of their manifests.

    Every row is in exactly one pair: those of A in its order, then what only B has.
    """
    if all(line.row_id is not None for line in (*a, *b)):
        return "row_id", _pairs(a, b, lambda line: line.row_id)
    shared = [name for name in _CONTENT if all(name in line.values for line in (*a, *b))]
    pairs = _pairs(a, b, lambda line: tuple(line.values[name] for name in shared))
    if any(pair.a and pair.b for pair in pairs):
        return "content", pairs
    return "place", _pairs(a, b, lambda line: (line.file, line.row, line.values["prompt"]))


def _pairs(a: Sequence[Line], b: Sequence[Line], key: Callable[[Line], Hashable]) -> list[Pair]:
    waiting: dict[Hashable, list[Line]] = {}
    for line in reversed(b):
        waiting.setdefault(key(line), []).append(line)
    pairs = []
    for line in a:
        partners = waiting.get(key(line))
        pairs.append(Pair(line, partners.pop() if partners else None))
    taken = {id(pair.b) for pair in pairs}
    return pairs + [Pair(None, line) for line in b if id(line) not in taken]
