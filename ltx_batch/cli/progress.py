"""Live progress on standard error: one panel in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from ltx_batch.cli.output import duration

if TYPE_CHECKING:
    from rich.panel import Panel

    from ltx_batch.tally import Summary

_LINE_EVERY_S = 10.0
_DRAINING = "draining: rows in workers' hands are finished, no new ones begin; another signal stops at once"


class Progress(Protocol):
    """A driver's listener that is open while the run goes."""

    def __call__(self, summary: Summary) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


def progress(title: str) -> Progress:
    from rich.console import Console

    console = Console(stderr=True)
    return Live(console, title) if console.is_terminal and not console.is_dumb_terminal else Lines(title)


class Lines:
    """A line at the start, about every ten seconds, and whenever a shard is finished."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._told_s = 0.0
        self._shards_done = 0
        self._draining = False

    def __enter__(self) -> Self:
        self._print(f"{self._title}: reading the manifest")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __call__(self, summary: Summary) -> None:
        if summary.draining and not self._draining:
            self._draining = True
            self._print(_DRAINING)
        due = time.monotonic() - self._told_s >= _LINE_EVERY_S
        if due or summary.shards_done != self._shards_done:
            self._told_s, self._shards_done = time.monotonic(), summary.shards_done
            self._print(line(summary))

    def _print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


class Live:
    """One panel that is drawn anew in its place."""

    def __init__(self, console: Any, title: str) -> None:
        from rich.live import Live as RichLive

        self._title = title
        self._live = RichLive(_panel(title, None), console=console, auto_refresh=False)
        self._console = console

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        self._console.show_cursor(True)  # a second signal ends the process on the spot: nothing would bring it back
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, summary: Summary) -> None:
        self._live.update(_panel(self._title, summary), refresh=True)


def line(summary: Summary) -> str:
    """`12/24 rows, 1 failed, shard 1/3, 0.52 rows/s, 23.1 s left, 2 workers`; before the workers, how far the text is"""
    if summary.text is not None and summary.ready_s is None:
        failed = f", {summary.text['failed']} failed" if summary.text["failed"] else ""
        return f"text: {summary.text['encoded']} encoded, {summary.text['cached']} in the cache{failed}"
    settled = summary.ok + summary.failed
    parts = [f"{settled}/{summary.rows} rows"]
    if summary.failed:
        parts.append(f"{summary.failed} failed")
    parts.append(f"{summary.shards_done}/{summary.shards} shards")
    if summary.rows_per_s:
        parts.append(f"{summary.rows_per_s:.2f} rows/s")
    if summary.eta_s is not None:
        parts.append(f"{duration(summary.eta_s)} left")
    parts.append(f"{summary.workers} worker{'' if summary.workers == 1 else 's'} ready")
    if summary.cost is not None:
        parts.append(f"cost {summary.cost:.2f}")
    return ", ".join(parts)


def _panel(title: str, summary: Summary | None) -> Panel:
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    body = Table.grid(expand=True)
    if summary is None:
        body.add_row("reading the manifest, starting workers")
    else:
        body.add_row(ProgressBar(summary.rows, summary.ok + summary.failed))
        body.add_row(Text(line(summary)))
        for message, count in summary.top_errors:
            body.add_row(Text(f"{count} x {message}", style="red", no_wrap=True, overflow="ellipsis"))
        if summary.draining:
            body.add_row(Text(_DRAINING, style="bold"))
    return Panel(
        body, title=Text(title), title_align="left", subtitle=None if summary is None else f"run {summary.run}"
    )
