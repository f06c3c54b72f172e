"""A plan as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ltx_batch.cli.output import duration
from ltx_batch.model.memory import GIB

if TYPE_CHECKING:
    from ltx_batch.model.forecast import Forecast
    from ltx_batch.plan import Estimate, JobPlan, Shape


_SHOWN = 5
_SHOWN_SHAPES = 40


def print_plan(found: JobPlan) -> None:
    console = Console(highlight=False)
    console.print(_rows(found))
    console.print(_shapes(found.shapes))
    for line in (*_schedules(found.shapes), *_memory(found.shapes)):
        console.print(line, markup=False)
    console.print(_estimated(found.estimate))
    for warning in found.warnings:
        console.print(f"warning: {warning}", markup=False)
    for note in {found.note, found.estimate.note} - {None}:
        console.print(f"note: {note}", markup=False)
    if found.other_rows:
        console.print(f"note: {found.other_rows} rows are of more sizes than are told", markup=False)
    if found.invalid:
        console.print(f"note: {found.invalid} rows break rules; `ltx-batch validate` names them", markup=False)


def _rows(found: JobPlan) -> str:
    done = "unknown" if found.done is None else str(found.done)
    failed = "unknown" if found.failed is None else str(found.failed)
    return f"rows: {found.new} new, {done} done, {failed} failed"


def _shapes(shapes: tuple[Shape, ...]) -> Table:
    table = Table("width x height", "frames", "rows", "new", "passes (tokens x calls)")
    for shape in shapes[:_SHOWN_SHAPES]:
        passes = ", ".join(f"{one.width}x{one.height}: {one.tokens} x {one.calls}" for one in shape.passes)
        new = "?" if shape.new is None else str(shape.new)
        table.add_row(f"{shape.width}x{shape.height}", str(shape.num_frames), str(shape.rows), new, passes)
    if len(shapes) > _SHOWN_SHAPES:
        table.add_row(f"... {len(shapes) - _SHOWN_SHAPES} more; --json has them")
    return table


def _schedules(shapes: tuple[Shape, ...]) -> list[str]:
    """Each distinct schedule once; those of one pass mostly differ in nothing but the size."""
    told = {
        (number, one.timesteps, one.row_forwards)
        for shape in shapes
        for number, one in enumerate(shape.passes, start=1)
    }
    return [
        f"pass {number}: {len(timesteps)} calls, {rows} rows forward, timesteps {', '.join(f'{t:g}' for t in timesteps)}"
        for number, timesteps, rows in sorted(told)
    ]


def _memory(shapes: tuple[Shape, ...]) -> list[str]:
    """What the largest sizes take of a GPU, and how they will be rendered there."""
    told = [_took(shape, shape.memory) for shape in shapes if shape.memory is not None]
    more = [f"... and of {len(told) - _SHOWN} more sizes; --json has all"] if len(told) > _SHOWN else []
    return told[:_SHOWN] + more


def _took(shape: Shape, memory: Forecast) -> str:
    size = f"memory of {shape.width}x{shape.height}, {shape.num_frames} frames"
    wanted = f"{memory.resident_bytes / GIB:.1f} GiB with every part in place, {memory.least_bytes / GIB:.1f} GiB at the least"
    if memory.placement is None:
        return f"{size}: {wanted}; model.device_memory_gib says what the GPUs have"
    doubt = "" if memory.fits else "; it may not fit"
    text = ""
    if memory.text is not None and memory.peak_bytes is not None:
        text = f"; the text encoder {memory.text}; {memory.peak_bytes / GIB:.1f} GiB in all at the peak"
    return f"{size}: {wanted}; {memory.placement}, {memory.reason}{doubt}{text}"


def _estimated(estimate: Estimate) -> str:
    if estimate.worker_hours is None or estimate.gpu_hours is None or estimate.storage_bytes is None:
        return "estimate: none"
    time = f"{duration(estimate.worker_hours * 3600)} of one worker's rendering, {estimate.gpu_hours:.2f} GPU-hours"
    cost = "" if estimate.cost is None else f", cost {estimate.cost:.2f}"
    return f"estimate: {time}{cost}, {estimate.storage_bytes / 1e6:.1f} MB of videos"
