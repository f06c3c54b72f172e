"""`quality`: how far two runs are from each other."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from ltx_batch.cli.options import AsJson
from ltx_batch.cli.output import duration, print_json, unwritable
from ltx_batch.errors import JobError

if TYPE_CHECKING:
    from rich.table import Table

    from ltx_batch.quality import RunsQuality
    from ltx_batch.quality.runs import Listener

_SHOWN_SKIPPED = 20
_LINE_EVERY_S = 10.0
_LOG_COLUMNS = 140


def quality(
    out_a: Annotated[str, typer.Argument(metavar="OUT_A", help="Output of the reference run, at any URI.")],
    out_b: Annotated[str, typer.Argument(metavar="OUT_B", help="Output of the other run; may be the same.")],
    run_a: Annotated[
        str | None, typer.Option(metavar="RUN", help="Beginning of A's run, where OUT_A has several.")
    ] = None,
    run_b: Annotated[
        str | None, typer.Option(metavar="RUN", help="Beginning of B's run, where OUT_B has several.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="DIR", help="Folder or URI. Default: quality/RUN_A-RUN_B.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Compare no more than so many rows.")] = None,
    pictures: Annotated[int, typer.Option(min=0, help="How many of the worst pairs to draw.")] = 8,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes. Default: as many as cores; 0: none beside this one.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Compare two runs row by row: PSNR, SSIM, LPIPS and VMAF. Exit code 1 where rows could not be compared."""
    from ltx_batch.quality import compare_runs, write_report
    from ltx_batch.quality.summary import as_dict
    from ltx_batch.storage import Storage

    folder = Storage(output or ".")
    if folder.is_local and (reason := unwritable(folder.uri)):
        raise JobError(f"-o {folder.uri}: {reason}")
    started_s = time.monotonic()
    with _progress() as listen:
        found = compare_runs(out_a, out_b, run_a=run_a, run_b=run_b, limit=limit, workers=workers, listen=listen)
    report = write_report(found, output or f"quality/{found.a.name}-{found.b.name}", pictures=pictures)
    seconds = time.monotonic() - started_s
    to = sys.stderr if as_json else sys.stdout
    _print_found(found, to)
    for note in report.notes:
        print(f"note: {note}", file=to)
    print(f"folder   {report.folder}   (in {duration(seconds)})", file=to)
    if as_json:
        more = {"folder": report.folder, "files": list(report.files), "notes": list(report.notes)}
        print_json({**as_dict(found), **more, "seconds": round(seconds, 3)})
    return 1 if found.skipped else 0


def _print_found(found: RunsQuality, to: TextIO) -> None:
    from rich.console import Console

    from ltx_batch.quality.summary import as_dict

    told = as_dict(found)
    print(f"A {found.a.label} in {found.a.storage.uri}\nB {found.b.label} in {found.b.storage.uri}", file=to)
    if found.compared:
        width = None if to.isatty() else _LOG_COLUMNS
        Console(file=to, highlight=False, width=width).print(_table(found), markup=False)
    if lossy := sorted({run.crf for run in (found.a, found.b) if run.crf}):
        crf = " and ".join(map(str, lossy))
        print(
            f"note: encoded with crf {crf}, which adds differences of its own; render with video.crf=0 for small ones",
            file=to,
        )
    for name, cure in found.unavailable.items():
        print(f"{name} is not available: {cure}", file=to)
    beyond = f", {found.beyond_limit} beyond the limit" if found.beyond_limit else ""
    print(
        f"{told['rows']} rows by {found.joined_by}: {told['compared']} compared, {told['identical']} of them identical, "
        f"{len(found.skipped)} not compared{beyond}",
        file=to,
    )
    for row in found.skipped[:_SHOWN_SKIPPED]:
        print(f"  {row.pair.name}: {row.reason}: {row.detail}", file=to)
    if len(found.skipped) > _SHOWN_SKIPPED:
        print(f"  ... and {len(found.skipped) - _SHOWN_SKIPPED} more; quality.parquet has them all", file=to)


def _table(found: RunsQuality) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ltx_batch.quality import METRICS
    from ltx_batch.quality.summary import aggregate

    table = Table("metric", "median", "mean", "5 % worse", "worst clip", "worst frame", box=SIMPLE_HEAD)
    for name, one in aggregate(found.rows).items():
        metric = METRICS[name]
        label = f"{metric.label} {'↑' if metric.higher_is_better else '↓'}"
        numbers = [metric.told(value) for value in (one.median, one.mean, one.p5, one.worst, one.worst_frame)]
        table.add_row(label, *numbers[:3], f"{numbers[3]} {one.worst_row}", f"{numbers[4]} {one.worst_frame_row}")
    return table


@contextmanager
def _progress() -> Iterator[Listener]:
    """A bar in a terminal, and now and then a line in a log."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("comparing clips", total=None)
        told_s = [time.monotonic()]

        def listen(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - told_s[0] >= _LINE_EVERY_S:
                told_s[0] = time.monotonic()
                print(f"{done}/{total} clips compared", file=sys.stderr, flush=True)

        yield listen
