"""What int8 does to numbers: of single layers, of the demo's predictions, of finished clips; the same of its outlier twin.

    python benchmarks/int8_quality.py                                # all of it: about 150 s on an H100
    python benchmarks/int8_quality.py --only layers velocity         # errors of layers and predictions alone
    python benchmarks/int8_quality.py --clips 4 --kinds int8 bnb-int8                # on a CPU, in two minutes

layers     a linear layer of 4096 and 16384 inputs against fp32, with Gaussian inputs, and with outliers in one channel of
           a thousand
velocity   what the transformer predicts at each step, on the very inputs of an fp32 render, against fp32
clips      finished clips of held-out captions against those of bf16 (on a CPU fp32), beside the floor: the reference once
           more, with another attention kernel. Raw frames; and what the demo's reader sees in them, clip by clip

The twin (outlier_twin.py) computes what the demo computes, with a few channels 64 times larger. Results are written after
each precision, to results/int8-quality-<GPU>.json, or on a CPU to results/int8-demo.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.clip_scores import Clips, Score, open_crew, score_clips  # noqa: E402
from benchmarks.demo_checkpoint.evaluate import ATTRIBUTES, Case, held_out_cases, render_cases  # noqa: E402
from benchmarks.int8_errors import layers, velocity  # noqa: E402
from benchmarks.int8_kinds import BF16, KINDS, Bench, Kind, Results, rounded, runs_here  # noqa: E402
from benchmarks.outlier_twin import write_twin  # noqa: E402
from ltx_batch import load_renderer  # noqa: E402
from ltx_batch.model.device import device_name, pick_device  # noqa: E402
from ltx_batch.model.lpips import Lpips  # noqa: E402
from ltx_batch.renderer import resolve_checkpoint  # noqa: E402

AT_ONCE = 16  # clips that are judged together
BATCH = {"cpu": 16, "cuda": 64}  # clips that are rendered together: so small a model waits for launches
MOST_WORKERS = 15


@dataclass(frozen=True)
class Judged:
    frames: Clips
    scores: list[Score]
    lpips: np.ndarray  # [clips]

    def values(self, metric: str) -> np.ndarray:
        return self.lpips if metric == "lpips" else np.array([getattr(score, metric) for score in self.scores])

    @property
    def right(self) -> np.ndarray:
        """bool [clips, attributes]."""
        return np.array([score.right for score in self.scores])


@dataclass
class Judge:
    """Clips of all cases, scored while the next ones are rendered."""

    device: torch.device
    cases: Sequence[Case]
    crew: Executor
    lpips: Lpips
    texts: Path  # embeddings, the same for all

    def judge(self, folder: Path, kind: Kind, reference: Clips | None = None) -> Judged:
        renderer = load_renderer(
            str(folder),
            precision=kind.precision,
            device=self.device.type,
            attention="native",  # timing would choose now this kernel and now that for passes as short as these
            text_cache=str(self.texts),
            **kind.bent,
        )
        made, waiting, distances = [], [], []
        with attention(kind):
            for start, clips in in_groups(render_cases(renderer, self.cases, batch=BATCH[self.device.type]), AT_ONCE):
                other = clips if reference is None else reference[start : start + len(clips)]
                expected = [case.expected for case in self.cases[start : start + len(clips)]]
                waiting.append(self.crew.submit(score_clips, clips, expected, other))
                if reference is not None:
                    frames = self.lpips(*(pair.reshape(-1, *pair.shape[2:]) for pair in (other, clips)))
                    distances.append(frames.reshape(len(clips), -1).mean(1))
                made.append(clips)
        renderer.close()
        scores = [score for future in waiting for score in future.result()]
        return Judged(np.concatenate(made), scores, np.concatenate(distances) if distances else np.zeros(len(scores)))


def clips(bench: Bench) -> None:
    reference = BF16 if bench.device.type == "cuda" else Kind("fp32", "fp32")
    floor = Kind("floor", reference.precision, other_attention=True)
    with open_crew(bench.workers) as crew:
        judge = Judge(
            bench.device, held_out_cases(bench.clips), crew, Lpips(device=bench.device), bench.folder / "texts"
        )
        known = {}
        for name, folder in bench.checkpoints.items():
            started_s = time.perf_counter()
            known[name] = judge.judge(folder, reference)
            print(f"{name} {reference.name}, the reference: {time.perf_counter() - started_s:.1f} s", flush=True)
        same = (known["demo"].frames == known["twin"].frames).all(axis=(1, 2, 3, 4))
        bench.results.add("twin_reference_same_clips", float(same.mean()), clips=bench.clips)
        for checkpoint, judged in known.items():
            shares = dict(zip(ATTRIBUTES, judged.right.mean(0).round(4).tolist(), strict=True))
            bench.results.add(f"{checkpoint}_reference_right", float(judged.right.all(1).mean()), by_attribute=shares)
        bench.results.write()

        def measure(checkpoint: str, kind: Kind) -> None:
            judged = judge.judge(bench.checkpoints[checkpoint], kind, known[checkpoint].frames)
            tell(bench.results, f"{checkpoint}_{kind.name}", judged, known[checkpoint])
            compare(bench.results, checkpoint)

        bench.each((floor, *bench.kinds), measure)


def attention(kind: Kind) -> AbstractContextManager[Any]:
    return sdpa_kernel(SDPBackend.MATH) if kind.other_attention else nullcontext()


def in_groups(frames: Iterator[np.ndarray], size: int) -> Iterator[tuple[int, Clips]]:
    """Stacked clips, and the number of the first of them."""
    start = 0
    while group := list(islice(frames, size)):
        yield start, np.stack(group)
        start += len(group)


def tell(results: Results, name: str, judged: Judged, reference: Judged) -> None:
    for metric, unit, low in (("psnr", "dB", True), ("ssim", "", True), ("lpips", "", False)):
        values = judged.values(metric)
        spread = {
            "median": rounded(float(np.median(values))),
            "p5": rounded(float(np.percentile(values, 5 if low else 95))),
            "worst": rounded(float(values.min() if low else values.max())),
        }
        results.add(f"{name}_{metric}", float(values.mean()), unit, **spread, clips=len(values))
    points = 100 * (judged.right.mean(0) - reference.right.mean(0))
    all_right, before = judged.right.all(1), reference.right.all(1)
    results.add(
        f"{name}_adherence",
        float(points[np.abs(points).argmax()]),
        "points",
        by_attribute=dict(zip(ATTRIBUTES, points.round(2).tolist(), strict=True)),
        all_right=round(100 * float(all_right.mean() - before.mean()), 2),
        lost=int((before & ~all_right).sum()),
        won=int((all_right & ~before).sum()),
    )


def compare(results: Results, checkpoint: str) -> None:
    ours, theirs = (results.figures.get(f"{checkpoint}_{name}_lpips") for name in ("int8", "bnb-int8"))
    if ours and theirs:
        medians = rounded(ours["median"] / theirs["median"])
        ratio = ours["value"] / theirs["value"]
        results.add(f"{checkpoint}_int8_lpips_over_bnb-int8", ratio, "x", of_medians=medians)


@contextmanager
def first_launches(device: torch.device) -> Iterator[None]:
    """Kernels are launched in the first way that fits this GPU: timing the others takes a minute, and all of them compute
    the same bits."""
    if device.type != "cuda":
        yield
        return
    from ltx_batch.model.quantize.kernels.tune import Tuner, limits

    def first(tuner: Tuner[Any], device: torch.device, *_: Any) -> Any:
        return tuner.fitting(*limits(device))[0]

    with patch.object(Tuner, "choose", first):
        yield


def main() -> None:
    measures = {"layers": layers, "velocity": velocity, "clips": clips}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(measures), help="default: all of them")
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--kinds", nargs="+", choices=[kind.name for kind in KINDS], help="default: all of them")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--workers", type=int, help="processes that judge clips; default: a core each, none on a CPU")
    parser.add_argument("--result", type=Path)
    options = parser.parse_args()
    device = pick_device(options.device)
    torch.backends.cudnn.allow_tf32 = False  # LPIPS is an fp32 number
    name = "demo" if device.type == "cpu" else f"quality-{device_name(device).split()[1].lower()}"
    results = Results(options.result or ROOT / "benchmarks" / "results" / f"int8-{name}.json", device)
    kinds = [kind for kind in KINDS if options.kinds is None or kind.name in options.kinds]
    kinds = [kind for kind in kinds if runs_here(kind, device)]
    cores = 0 if device.type == "cpu" else min(MOST_WORKERS, (os.cpu_count() or 2) - 1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {"demo": Path(resolve_checkpoint("demo")), "twin": write_twin(Path(folder, "twin"))}
        workers = cores if options.workers is None else options.workers
        bench = Bench(device, kinds, checkpoints, Path(folder), options.clips, workers, results)
        with first_launches(device):
            for what in options.only or measures:
                measures[what](bench)


if __name__ == "__main__":
    main()
