"""Counts of a run while it goes, and what is told of them: heartbeat, progress line, summary."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from ltx_batch.record import RenderRecord

_TOP_ERRORS = 5
_KINDS_OF_ERRORS = 1000
_MESSAGE_CHARS = 160


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to. `rendered`, `gpu_seconds` and `seconds` are this call's; `cost` is null without a price.

    `ready_s` is the part of `seconds` that went by before a worker was ready: start-up of Ray, text phase, model load.
    `idle`: nothing was left to do. `text` is what the text phase did: `{"encoded", "cached", "failed", "seconds"}`, null where there was none.
    """

    run: str
    rows: int
    ok: int
    failed: int
    rendered: int
    reused: int
    seconds: float
    gpu_seconds: float
    cost: float | None
    ready_s: float | None = None
    rows_per_s: float = 0.0
    eta_s: float | None = None
    workers: int = 0
    shards: int = 0
    shards_done: int = 0
    top_errors: tuple[tuple[str, int], ...] = ()
    draining: bool = False
    stopped: str | None = None
    idle: bool = False
    text: dict[str, Any] | None = None

    @property
    def exit_code(self) -> int:
        """0 all ok, 1 failed rows, 3 ended before the last row (`on_failed_rows` is applied by the command line)."""
        return 3 if self.stopped else 1 if self.failed else 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(slots=True)
class Tally:
    """`tried_in_vain` are failed rows of this call, without those that its user chose to skip: a reason to stop."""

    run: str
    rows: int
    gpu_hour_price: float | None = None
    ok: int = 0
    failed: int = 0
    tried_in_vain: int = 0
    rendered: int = 0
    shards: int = 0
    shards_done: int = 0
    gpu_seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    started_s: float = field(default_factory=time.monotonic)
    ready_s: float | None = None
    first_s: float | None = None
    text: dict[str, Any] | None = None

    @property
    def left(self) -> int:
        """Rows without an end."""
        return self.rows - self.ok - self.failed

    def count_finished(self, ok: int, failed: int) -> None:
        """Rows that an earlier call settled."""
        self.ok += ok
        self.failed += failed

    def count(self, record: RenderRecord, *, skipped: bool = False) -> None:
        """A row that this call settled; `skipped` by its user's choice."""
        if record.ok:
            self.ok += 1
        else:
            self.failed += 1
            self.tried_in_vain += not skipped
            first_line = (record.error or "").partition("\n")[0]
            self._count_error(f"{record.error_class}: {first_line}"[:_MESSAGE_CHARS])
        if record.ok and not record.reused:
            self.rendered += 1
            self.gpu_seconds += record.gpu_seconds
            self.first_s = self.first_s or time.monotonic()

    def mend(self, rows: int) -> None:
        """Rows counted as failed whose record turned out to stand."""
        self.ok += rows
        self.failed -= rows

    def _count_error(self, message: str) -> None:
        """Messages may name paths, one a row: beyond a thousand kinds they are counted together."""
        known = message in self.errors or len(self.errors) < _KINDS_OF_ERRORS
        self.errors[message if known else "other errors"] += 1

    def worker_ready(self) -> None:
        if self.ready_s is None:
            self.ready_s = round(time.monotonic() - self.started_s, 3)

    def summary(
        self, *, workers: int = 0, draining: bool = False, stopped: str | None = None, idle: bool = False
    ) -> Summary:
        seconds = time.monotonic() - self.started_s
        active = seconds if self.first_s is None else time.monotonic() - self.first_s
        rate = (self.rendered - 1) / active if self.rendered > 1 and active > 0 else 0.0
        price = self.gpu_hour_price
        return Summary(
            run=self.run,
            rows=self.rows,
            ok=self.ok,
            failed=self.failed,
            rendered=self.rendered,
            reused=self.ok - self.rendered,
            seconds=round(seconds, 3),
            gpu_seconds=round(self.gpu_seconds, 3),
            cost=None if price is None else round(self.gpu_seconds / 3600 * price, 4),
            ready_s=self.ready_s,
            rows_per_s=round(rate, 3),
            eta_s=round(self.left / rate, 1) if rate and self.left else None,
            workers=workers,
            shards=self.shards,
            shards_done=self.shards_done,
            top_errors=tuple(self.errors.most_common(_TOP_ERRORS)),
            draining=draining,
            stopped=stopped,
            idle=idle,
            text=self.text,
        )
