"""How many rows a second the job side carries, and whether the driver's memory stays flat.

    python benchmarks/scale.py [--rows 2000 20000] [--workers 2]

FakeRenderer and a dummy encoder, everything else real: a Parquet manifest, Ray actors, and the ledger on local disk with
its fsyncs. Each size runs in a process of its own, whose peak memory is the driver's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from results_file import write_result

RESULT = Path(__file__).parent / "results" / "scale.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 20_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one, arguments.workers)))
        return
    results = {rows: in_process(rows, arguments.workers) for rows in arguments.rows}
    small, large = results[min(results)], results[max(results)]
    figures = [
        {"name": f"{name}_{rows}_rows", "value": round(result[name], 1), "unit": unit}
        for rows, result in results.items()
        for name, unit in (("rows_per_s", "rows/s"), ("driver_peak_mib", "MiB"), ("rerun_s", "s"))
    ]
    growth = large["driver_peak_mib"] - small["driver_peak_mib"]
    figures.append({"name": "driver_peak_growth_mib", "value": round(growth, 1), "unit": "MiB", "bound": "at most 50"})
    write_result(
        RESULT,
        figures,
        notes="rows_per_s counts from the first finished row to the last; rerun_s is the same command again",
    )


def in_process(rows: int, workers: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", str(rows), "--workers", str(workers)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(rows: int, workers: int) -> dict[str, float]:
    from ltx_batch.driver import run
    from ltx_batch.job import parse_job

    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder, "manifest.parquet")
        columns = {
            "row_id": [f"row-{i}" for i in range(rows)],
            "prompt": [f"a red circle, take {i}" for i in range(rows)],
        }
        pq.write_table(pa.table(columns), manifest, row_group_size=8192)
        job = parse_job(
            {
                "manifest": str(manifest),
                "output": f"{folder}/out",
                "model": {"renderer": "fake", "precision": "fp32"},
                "workers": workers,
                "worker": {"num_gpus": 0, "in_flight": 4},
                "defaults": {"height": 32, "width": 32, "num_frames": 1},
                "video": {"codec": "fake"},
            }
        )
        first = run(job)
        assert (first.ok, first.failed, first.rendered) == (rows, 0, rows), first
        again = run(job)
        assert (again.ok, again.rendered) == (rows, 0), again
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rows_per_s": first.rows_per_s, "driver_peak_mib": peak_kib / 1024, "rerun_s": again.seconds}


if __name__ == "__main__":
    main()
