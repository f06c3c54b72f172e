"""Many clips' quality as a few numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ltx_batch.quality.metrics import METRICS, Metric
from ltx_batch.quality.rows import RowQuality
from ltx_batch.quality.runs import Run, RunsQuality


@dataclass(frozen=True, slots=True)
class Aggregate:
    """One metric over `clips`, of their means over frames. `p5`: 5 in 100 clips are worse than this. `worst` is the worst
    clip, `worst_row` its row; `worst_frame` is the worst single frame of all, and `worst_frame_row` the row it is in."""

    clips: int
    median: float
    mean: float
    p5: float
    worst: float
    worst_row: str
    worst_frame: float
    worst_frame_row: str


def aggregate(rows: Sequence[RowQuality]) -> dict[str, Aggregate]:
    """By metric; one that no row has is left out."""
    found = {name: _aggregate(metric, rows) for name, metric in METRICS.items()}
    return {name: each for name, each in found.items() if each is not None}


def as_dict(found: RunsQuality) -> dict[str, Any]:
    """What is the same for all rows, as plain data."""
    return {
        "a": _described(found.a),
        "b": _described(found.b),
        "joined_by": found.joined_by,
        "rows": len(found.rows),
        "compared": len(found.compared),
        "identical": sum(is_identical(row) for row in found.compared),
        "same_frames": sum(row.pair.same_frames is True for row in found.compared),
        "skipped": dict(Counter(row.reason for row in found.skipped)),
        "beyond_limit": found.beyond_limit,
        "metrics": {name: asdict(each) for name, each in aggregate(found.rows).items()},
        "unavailable": dict(found.unavailable),
    }


def is_identical(row: RowQuality) -> bool:
    return row.quality is not None and row.quality.identical_frames == row.quality.num_frames


def worst_first(found: RunsQuality) -> tuple[Metric, list[RowQuality]]:
    """The rows that differ at all, the worst before the others: by LPIPS, or else by what there is. Of equal rows, which
    share their videos, the first."""
    metric = METRICS[next(name for name in ("lpips", "ssim", "psnr") if name not in found.unavailable)]
    scored: dict[tuple[str, str], tuple[float, RowQuality]] = {}
    for row in found.compared:
        score = row.quality and row.quality.score(metric.name)
        if score and not is_identical(row):
            scored.setdefault(row.pair.videos, (score.mean, row))
    ranked = sorted(scored.values(), key=lambda each: each[0], reverse=not metric.higher_is_better)
    return metric, [row for _, row in ranked]


def _aggregate(metric: Metric, rows: Sequence[RowQuality]) -> Aggregate | None:
    scored = [(row, score) for row in rows if row.quality and (score := row.quality.score(metric.name))]
    if not scored:
        return None
    means = np.array([score.mean for _, score in scored])
    frames = np.array([score.worst for _, score in scored])
    at, at_frame = metric.worst(means), metric.worst(frames)
    return Aggregate(
        clips=len(scored),
        median=float(np.median(means)),
        mean=float(means.mean()),
        p5=float(np.percentile(means, 5 if metric.higher_is_better else 95)),
        worst=float(means[at]),
        worst_row=scored[at][0].pair.name,
        worst_frame=float(frames[at_frame]),
        worst_frame_row=scored[at_frame][0].pair.name,
    )


def _described(run: Run) -> dict[str, Any]:
    return {"output": run.storage.uri, "run": run.name, "precision": run.precision, "crf": run.crf}
