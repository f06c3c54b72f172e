"""What is printed when a verb is done."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from ltx_batch.cli.options import Asked
    from ltx_batch.tally import Summary


def print_json(data: Mapping[str, Any]) -> None:
    """One object on one line, the last of standard output."""
    print(json.dumps(data), flush=True)


def print_summary(asked: Asked, output: str, summary: Summary) -> None:
    """How the run ended, where things are, and what to type next."""
    to = sys.stderr if asked.as_json else sys.stdout
    print(counts(summary.as_dict()), file=to)
    if summary.stopped:
        print(f"stopped: {summary.stopped}", file=to)
    print_errors(summary.top_errors, to)
    print_places(output, summary.run, to)
    print(f"next     {_next(asked, summary)}", file=to)


def counts(told: Mapping[str, Any]) -> str:
    """`24 rows: 24 ok (20 rendered, 4 reused), 0 failed, in 38.2 s`"""
    seconds = "" if told.get("seconds") is None else f", in {duration(told['seconds'])}"
    gpu = f", {told['gpu_seconds'] / 3600:.2f} GPU-hours" if told.get("gpu_seconds") else ""
    cost = "" if told.get("cost") is None else f", cost {told['cost']:.2f}"
    ok = f"{told['ok']} ok ({told['rendered']} rendered, {told['reused']} reused)"
    return f"{told['rows']} rows: {ok}, {told['failed']} failed{seconds}{gpu}{cost}"


def print_errors(errors: Iterable[Sequence[Any]], to: TextIO) -> None:
    for message, count in errors:
        print(f"  {count} x {message}", file=to)


def print_places(output: str, run: str, to: TextIO) -> None:
    root = output.rstrip("/")
    print(f"videos   {root}/videos/", file=to)
    print(
        f"rows     {root}/runs/{run}/shards/*.parquet   (ltx_status, ltx_video, ltx_error beside your columns)", file=to
    )


def duration(seconds: float) -> str:
    """`8.4 s`, `3 min 20 s`, `5 h 12 min`"""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def unwritable(target: str | Path) -> str | None:
    """Why nothing can be written to a local path or below it; None where it can. Nothing is made."""
    path = Path(target).absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if there == path and not there.is_dir():
        there = there.parent
    return None if there.is_dir() and os.access(there, os.W_OK) else f"{there} is no folder that can be written to"


def after_failures(asked: Asked, failed: int, errors: Iterable[Sequence[Any]]) -> str:
    """What to type where rows failed. Another try helps no row that breaks a rule."""
    if sum(count for message, count in errors if message.startswith("InvalidRow:")) == failed:
        return f"{asked.command('validate')}   # names the rows to mend; then run again"
    return f"{asked.command('retry')}   # tries the failed rows again"


def _next(asked: Asked, summary: Summary) -> str:
    if summary.stopped:
        return f"{asked.command('run')}   # goes on where this stopped"
    if summary.failed:
        return after_failures(asked, summary.failed, summary.top_errors)
    return f"{asked.command('report')}   # draws a contact sheet of the clips"
