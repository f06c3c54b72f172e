"""The metrics of many clips as one picture. The one module that loads matplotlib, of the extra `quality`."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ltx_batch.quality.metrics import METRICS, Metric
from ltx_batch.quality.rows import RowQuality

_BLUE, _PALE, _INK = "#2563a8", "#a9c3de", "#404040"
_ROW_INCHES, _WIDTH_INCHES, _DPI = 2.4, 11.0, 110
_MOST_BINS = 40


def draw_plot(rows: Sequence[RowQuality], title: str) -> bytes:
    """A PNG with a line of two panels for each metric that the rows have: its distribution over clips, and its value row
    by row, with the worst frame of each."""
    scores = {
        name: [(at, score) for at, row in enumerate(rows) if row.quality and (score := row.quality.score(name))]
        for name in METRICS
    }
    drawn = [name for name in METRICS if scores[name]]
    figure = Figure(figsize=(_WIDTH_INCHES, 0.6 + _ROW_INCHES * len(drawn)), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(drawn), 2, width_ratios=(1, 2), squeeze=False)
    for (left, right), name in zip(grid, drawn, strict=True):
        means = [score.mean for _, score in scores[name]]
        _draw_distribution(left, METRICS[name], means)
        _draw_rows(right, METRICS[name], [at for at, _ in scores[name]], means, [one.worst for _, one in scores[name]])
    grid[-1][1].set_xlabel("row")
    grid[0][1].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def _draw_distribution(axes: Axes, metric: Metric, means: list[float]) -> None:
    median = statistics.median(means)
    axes.hist(means, bins=max(5, min(_MOST_BINS, len(means) // 4)), color=_BLUE)
    axes.axvline(median, color=_INK, linewidth=1, linestyle="--")
    axes.set_title(f"{metric.label}: median {metric.told(median)}", fontsize=10, loc="left")
    axes.set_ylabel("clips")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def _draw_rows(axes: Axes, metric: Metric, places: list[int], means: list[float], worst: list[float]) -> None:
    size = 16 if len(places) <= 200 else 4
    axes.vlines(places, means, worst, color=_PALE, linewidth=1, zorder=1)
    axes.scatter(places, worst, s=size, color=_PALE, zorder=2, label="worst frame")
    axes.scatter(places, means, s=size, color=_BLUE, zorder=3, label="mean of frames")
    axes.set_title(
        f"{metric.title} by row, {'higher' if metric.higher_is_better else 'lower'} is nearer", fontsize=10, loc="left"
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e4e4e4")
    axes.set_axisbelow(True)
