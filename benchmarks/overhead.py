"""What the job side costs over a bare loop on the same rows.

    python benchmarks/overhead.py [--rows 64] [--pairs 5]

A pair is a `for` loop that renders and encodes to local files, and one Ray actor that does the same through the ledger,
one after the other; which goes first alternates. Both use the number of torch threads that is fastest for the loop. The
start-up of Ray and the load of the model are left out of the ratio and given apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from results_file import write_result

RESULT = Path(__file__).parent / "results" / "overhead.json"
SHAPE = {"height": 128, "width": 128, "num_frames": 17, "frame_rate": 16.0}
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")


def prompts(rows: int) -> list[str]:
    return [f"a {COLOURS[i % 4]} {SHAPES[i % 3]} moves right over a dark background" for i in range(rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--loop", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loop:
        print(json.dumps(loop(arguments.rows)))
        return
    threads = fastest_threads()
    loops, jobs = [], []
    for pair in range(arguments.pairs):
        for side in ("loop", "job") if pair % 2 == 0 else ("job", "loop"):
            if side == "loop":
                loops.append(timed_loop(arguments.rows, threads))
            else:
                jobs.append(job(arguments.rows, workers=1, threads=threads))
    both = job(arguments.rows, workers=2, threads=1)
    report(arguments.rows, threads, loops, jobs, both)


def fastest_threads(rounds: int = 3) -> int:
    """The number of torch threads with which 16 rows of the loop take least, each number tried `rounds` times in turn."""
    counts = range(1, (os.cpu_count() or 1) + 1)
    tries = [(timed_loop(16, threads)["seconds"], threads) for _ in range(rounds) for threads in counts]
    return min(tries)[1]


def report(
    rows: int, threads: int, loops: list[dict[str, float]], jobs: list[dict[str, float]], both: dict[str, float]
) -> None:
    ratios = [job["seconds"] / loop["seconds"] for loop, job in zip(loops, jobs, strict=True)]
    figures = [
        {
            "name": "ratio_median",
            "value": round(statistics.median(ratios), 3),
            "unit": "job/loop",
            "bound": "at most 1.10",
        },
        {"name": "ratio_spread", "value": [round(min(ratios), 3), round(max(ratios), 3)], "unit": "job/loop"},
        {"name": "torch_threads", "value": threads, "unit": "threads"},
        {"name": "loop_median_s", "value": median(loops, "seconds"), "unit": f"s for {rows} rows"},
        {"name": "job_median_s", "value": median(jobs, "seconds"), "unit": f"s for {rows} rows"},
        {"name": "ray_and_model_ready_s", "value": median(jobs, "ready_s"), "unit": "s"},
        {"name": "loop_model_load_s", "value": median(loops, "load_s"), "unit": "s"},
        {"name": "rows_per_s_one_actor", "value": round(rows / median(jobs, "seconds"), 2), "unit": "rows/s"},
        {"name": "rows_per_s_two_actors", "value": round(rows / both["seconds"], 2), "unit": "rows/s, 1 thread each"},
    ]
    write_result(RESULT, figures, notes=f"{SHAPE}, demo checkpoint, fp32, {len(jobs)} interleaved pairs")


def median(results: list[dict[str, float]], name: str) -> float:
    return round(statistics.median(result[name] for result in results), 2)


def timed_loop(rows: int, threads: int) -> dict[str, float]:
    """The loop in a process of its own, so that its thread count holds."""
    command = [sys.executable, __file__, "--loop", "--rows", str(rows)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def loop(rows: int) -> dict[str, float]:
    from ltx_batch import RenderRequest, load_renderer
    from ltx_batch.job import VideoSpec
    from ltx_batch.media import write_video

    started_s = time.perf_counter()
    renderer = load_renderer("demo", precision="fp32", device="cpu")
    load_s = time.perf_counter() - started_s
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.perf_counter()
        for index, prompt in enumerate(prompts(rows)):
            clip = renderer.render([RenderRequest(prompt=prompt, seed=index, **SHAPE)])[0]
            write_video(clip, Path(folder, f"{index}.mp4"), VideoSpec(), metadata={})
        seconds = time.perf_counter() - started_s
    return {"seconds": seconds, "load_s": load_s}


def job(rows: int, *, workers: int, threads: int) -> dict[str, float]:
    from ltx_batch.driver import run
    from ltx_batch.job import parse_job

    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "manifest.parquet")
        pq.write_table(pa.table({"prompt": prompts(rows), "seed": list(range(rows))}), manifest)
        summary = run(
            parse_job(
                {
                    "manifest": str(manifest),
                    "output": f"{folder}/out",
                    "model": {"checkpoint": "demo", "precision": "fp32", "device": "cpu"},
                    "workers": workers,
                    "worker": {"num_cpus": 1, "torch_threads": threads},
                    "defaults": SHAPE,
                }
            )
        )
    assert (summary.ok, summary.rendered) == (rows, rows), summary
    assert summary.ready_s is not None
    return {"seconds": summary.seconds - summary.ready_s, "ready_s": summary.ready_s}


if __name__ == "__main__":
    main()
