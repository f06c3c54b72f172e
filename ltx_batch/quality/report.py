"""A comparison as a folder that stands by itself.

quality.json       the summary, and a line for every row under "lines"
quality.parquet    the same lines
plot.png           distribution of each metric, and each metric row by row
worst/01.png ...   the worst pairs: A, B and their amplified difference, at the worst frame
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from ltx_batch.media import read_media
from ltx_batch.quality.metrics import METRICS, Metric
from ltx_batch.quality.pictures import draw_pair
from ltx_batch.quality.rows import RowQuality
from ltx_batch.quality.runs import RunsQuality, local_video
from ltx_batch.quality.summary import as_dict, worst_first
from ltx_batch.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa

MAX_PICTURES = 8


@dataclass(frozen=True, slots=True)
class Report:
    """`files` are names below `folder`; `notes` say what is not there and how to get it."""

    folder: str
    files: tuple[str, ...]
    notes: tuple[str, ...]


def write_report(found: RunsQuality, folder: str, *, pictures: int = MAX_PICTURES) -> Report:
    """Write a comparison into `folder`, a local path or any URI, over an older one if need be."""
    storage = Storage(folder, options=found.b.storage.options)
    for stale in storage.list("worst"):
        storage.delete(stale)
    files, notes = ["quality.json", "quality.parquet"], []
    lines = [row.as_dict() for row in found.rows]
    storage.replace("quality.json", json.dumps({**as_dict(found), "lines": lines}, indent=1).encode() + b"\n")
    storage.replace("quality.parquet", _parquet(lines))
    if not found.compared:
        notes.append("no plot and no pictures: no row could be compared")
    elif importlib.util.find_spec("matplotlib") is None:
        notes.append("no plot: matplotlib is not installed: pip install 'ltx-batch[quality]'")
    else:
        files.append(_write_plot(storage, found))
    metric, worst = worst_first(found)
    for number, row in enumerate(worst[:pictures], 1):
        files.append(f"worst/{number:02d}.png")
        storage.replace(files[-1], _png(_picture(found, row, metric)))
    return Report(storage.uri, tuple(files), tuple(notes))


def _write_plot(storage: Storage, found: RunsQuality) -> str:
    from ltx_batch.quality.plot import draw_plot

    storage.replace("plot.png", draw_plot(found.rows, f"run {found.b.label} against run {found.a.label}"))
    return "plot.png"


def _picture(found: RunsQuality, row: RowQuality, metric: Metric) -> Image.Image:
    assert row.quality is not None
    score = row.quality.score(metric.name)
    assert score is not None
    with (
        local_video(found.a.storage, row.pair.videos[0]) as a,
        local_video(found.b.storage, row.pair.videos[1]) as b,
    ):
        one, other = (read_media(path, num_frames=score.worst_frame + 1)[-1] for path in (a, b))
    place = f"{row.pair.name}, frame {score.worst_frame} of 0 to {row.quality.num_frames - 1}"
    means = [_told(METRICS[name], its.mean) for name in METRICS if (its := row.quality.score(name))]
    caption = (
        f"{place}: {_told(metric, score.worst)}; the whole clip: {', '.join(means)}",
        row.pair.known.values["prompt"],
    )
    return draw_pair(one, other, (f"A: run {found.a.label}", f"B: run {found.b.label}"), caption)


def _told(metric: Metric, value: float) -> str:
    return f"{metric.title} {metric.told(value)} {metric.unit}".rstrip()


def _png(picture: Image.Image) -> bytes:
    target = io.BytesIO()
    picture.save(target, "PNG")
    return target.getvalue()


def _parquet(lines: Sequence[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(lines), schema=_schema()), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _schema() -> pa.Schema:
    """By name, since a column that is null in every row still has its type."""
    import pyarrow as pa

    text, count, number = pa.string(), pa.int64(), pa.float64()
    fields = [("row_id", text), ("prompt", text)]
    for side in ("a", "b"):
        fields += [(f"file_{side}", count), (f"row_{side}", count), (f"video_{side}", text)]
    fields += [("same_frames", pa.bool_()), ("reason", text), ("detail", text)]
    fields += [(name, count) for name in ("num_frames", "height", "width", "identical_frames")]
    for name in METRICS:
        fields += [(name, number), (f"{name}_worst", number), (f"{name}_worst_frame", count)]
    return pa.schema(fields)
