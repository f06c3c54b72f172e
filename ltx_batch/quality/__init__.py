"""How far two runs, or two clips, are from each other: PSNR, SSIM, LPIPS and VMAF.

compare_clips("a.mp4", "b.mp4").lpips.mean
found = compare_runs("out/bf16", "out/int8", workers=4)
write_report(found, "out/bf16-int8")
"""

from ltx_batch.quality.clips import ClipQuality, Score, compare_clips
from ltx_batch.quality.metrics import METRICS, Metric, unavailable
from ltx_batch.quality.report import write_report
from ltx_batch.quality.rows import RowQuality
from ltx_batch.quality.runs import RunsQuality, compare_runs

__all__ = [
    "METRICS",
    "ClipQuality",
    "Metric",
    "RowQuality",
    "RunsQuality",
    "Score",
    "compare_clips",
    "compare_runs",
    "unavailable",
    "write_report",
]
