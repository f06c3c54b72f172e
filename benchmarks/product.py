"""The product's sentence, run: one job through Ray, two actors, 13B in int8, an actor killed midway, every row ok.

    python benchmarks/product.py [--rows 32] [--workers 2] [--hadamard-group 64] [--keep-blocks N] [--scratch FOLDER]
    python benchmarks/product.py --tiny           # the same with a tiny model and two actors on this machine's CPU

It writes a prequantised folder of random weights (random_folder.py: 16 GB, no file of the transformer in 16 bits; the text
encoder is one small layer, so text costs nothing), renders a manifest at 512x768x49 in the distilled preset's two passes,
encodes with ffmpeg, and commits through the ledger on a local disk. Clips of random weights are noise, the worst there is for an
encoder: so an actor holds many rows, of which one renders and the others are encoded, each on a core.

The first run is undisturbed: an actor's share is the seconds of its render stages over the time from its first render's begin
to its last one's end, as its records tell. A first render that compiles kernels is long, so the share is told without it too.
In the second run, into another output, one actor gets SIGKILL when a third of the rows are done. Figures go into
results/int8-<GPU>.json.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ltx_batch.job import parse_job  # noqa: E402
from ltx_batch.record import RenderRecord  # noqa: E402
from ltx_batch.worker import open_output  # noqa: E402

PRESET = "ltxv-13b-0.9.8-distilled"
STAGES = ("lora", "text", "condition", "denoise", "upsample", "decode")  # of a render; the rest runs beside another's
SHARE_BOUND = ">= 0.90"
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is over: the driver's summary, and the records of its output."""

    exit_code: int
    summary: dict[str, Any]
    records: list[RenderRecord]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--in-flight", type=int, default=14, help="rows an actor holds: one renders, others are encoded"
    )
    parser.add_argument("--hadamard-group", type=int, default=None)
    parser.add_argument("--keep-blocks", type=int, default=None)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/ltx-batch-product"), help="a folder on a local disk")
    parser.add_argument("--output", type=Path, default=None, help="of the figures")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU: tries the script, measures nothing")
    options = parser.parse_args()
    shutil.rmtree(options.scratch, ignore_errors=True)
    options.scratch.mkdir(parents=True)
    try:
        write_checkpoint(options)
        undisturbed = run(options, "undisturbed", kill_after=None)
        report_undisturbed(options, undisturbed)
        killed = run(options, "killed", kill_after=options.rows // 3)
        report_killed(options, undisturbed, killed)
    finally:
        shutil.rmtree(options.scratch, ignore_errors=True)


def write_checkpoint(options: argparse.Namespace) -> None:
    """In a process of its own, which leaves nothing on a GPU."""
    started_s = time.monotonic()
    name = "tiny" if options.tiny else "13b"
    command = [sys.executable, str(ROOT / "benchmarks" / "random_folder.py"), str(options.scratch / "model")]
    for option in ("hadamard_group", "keep_blocks"):
        if (value := getattr(options, option)) is not None:
            command += [f"--{option.replace('_', '-')}", str(value)]
    subprocess.run([*command, "--model", name, "--precision", "int8"], check=True)
    print(f"checkpoint written in {time.monotonic() - started_s:.0f} s", flush=True)


def job(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """The job of one run, as a job file has it."""
    manifest = options.scratch / "manifest.parquet"
    colours, shapes = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
    prompts = [f"a {colours[i % 4]} {shapes[i % 3]} moves right, number {i}" for i in range(options.rows)]
    pq.write_table(pa.table({"prompt": prompts, "seed": list(range(options.rows))}), manifest)
    height, width, frames = (64, 96, 9) if options.tiny else (512, 768, 49)
    return {
        "manifest": str(manifest),
        "output": str(options.scratch / name),
        "model": {
            "checkpoint": str(options.scratch / "model"),
            "pipeline_config": PRESET,
            "precision": "int8",
            "device": "cpu" if options.tiny else "cuda",
        },
        "workers": options.workers,
        "worker": {
            "num_cpus": 1 if options.tiny else options.in_flight,
            "num_gpus": 0 if options.tiny else 1,
            "in_flight": options.in_flight,
        },
        "defaults": {"height": height, "width": width, "num_frames": frames, "frame_rate": 24},
    }


def run(options: argparse.Namespace, name: str, *, kill_after: int | None) -> Run:
    """The job through the command line, to its end; one of its actors is killed once so many rows are done."""
    data = job(options, name)
    file = options.scratch / f"{name}.yaml"
    file.write_text(yaml.safe_dump(data))
    places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "ltx_batch.cli", "run", str(file), "--json"]
    driver = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    )
    try:
        if kill_after is not None:
            kill_an_actor(driver, data, kill_after)
        out, _ = driver.communicate()
    finally:
        driver.kill()
    summary = json.loads(out.splitlines()[-1])
    print(f"{name}: {summary}", flush=True)
    return Run(driver.returncode, summary, read_records(data))


def kill_an_actor(driver: subprocess.Popen[str], data: dict[str, Any], kill_after: int) -> None:
    """SIGKILL to the process that wrote the latest record, which by then renders another row."""
    while driver.poll() is None:
        records = read_records(data)
        if len(records) >= kill_after:
            latest = max(records, key=lambda record: record.finished_at or "")
            victim = int((latest.worker or "").rpartition(":")[2])
            os.kill(victim, signal.SIGKILL)
            print(f"killed {latest.worker} after {len(records)} rows", flush=True)
            return
        time.sleep(_POLL_S)


def read_records(data: dict[str, Any]) -> list[RenderRecord]:
    storage = open_output(parse_job(data))
    return [RenderRecord.from_json(storage.read(name)) for name in storage.list("videos") if name.endswith(".json")]


def whole_videos(options: argparse.Namespace, name: str, records: Sequence[RenderRecord]) -> int:
    """How many ok records have their video, byte for byte."""
    output = options.scratch / name
    return sum(
        record.ok and hashlib.sha256((output / str(record.video)).read_bytes()).hexdigest() == record.sha256
        for record in records
    )


def shares(records: Sequence[RenderRecord], *, skip: int = 0) -> dict[str, float]:
    """By actor: seconds of the render stages over those between the begin of its first render, but for so many, and the end
    of its last."""
    by_actor: dict[str, list[RenderRecord]] = defaultdict(list)
    for record in records:
        by_actor[str(record.worker)].append(record)
    found = {}
    for actor, rendered in by_actor.items():
        own = sorted(rendered, key=lambda record: _seconds(record) - record.timings["encode"])[skip:]
        if not own:
            continue
        ends_s = [_seconds(record) - record.timings["encode"] for record in own]
        begins_s = [end_s - record.timings["render"] for end_s, record in zip(ends_s, own, strict=True)]
        rendering_s = sum(record.timings.get(stage, 0.0) for record in own for stage in STAGES)
        found[actor] = round(rendering_s / (max(ends_s) - min(begins_s)), 4)
    return found


def _seconds(record: RenderRecord) -> float:
    return datetime.datetime.fromisoformat(str(record.finished_at)).timestamp()


def report_undisturbed(options: argparse.Namespace, done: Run) -> None:
    """Shares and the table of stages; raises AssertionError where a row failed."""
    assert (done.exit_code, done.summary["ok"]) == (0, options.rows), done.summary
    assert whole_videos(options, "undisturbed", done.records) == options.rows
    bench = open_bench(options)
    found = shares(done.records)
    told = {"bound": SHARE_BOUND, "rows": options.rows, "in_flight": options.in_flight}
    each = {"actors": found, "actors_but_for_the_first_render": shares(done.records, skip=1)}
    bench.report("product_render_share", min(found.values()), "", **told, **each, text="one small random layer, inline")
    rendering_s = done.summary["seconds"] - done.summary["ready_s"]
    ready = {"ready_s": round(done.summary["ready_s"], 1), "actors": len(found)}
    bench.report("product_rows_per_s", options.rows / rendering_s, "rows/s", **ready)
    for name in done.records[0].timings:
        times = sorted(record.timings[name] for record in done.records)
        bench.report(f"product_stage_{name}_s", median(times), "s", least=times[0], most=times[-1])


def report_killed(options: argparse.Namespace, undisturbed: Run, done: Run) -> None:
    """Every row ok, from three processes, with the same frames as before."""
    bench = open_bench(options)
    frames = {record.key: record.frames_sha256 for record in undisturbed.records}
    more = {
        "rows": options.rows,
        "exit_code": done.exit_code,
        "whole_videos": whole_videos(options, "killed", done.records),
        "same_frames": sum(frames[record.key] == record.frames_sha256 for record in done.records),
        "processes": len({record.worker for record in done.records}),
        "seconds_more": round(done.summary["seconds"] - undisturbed.summary["seconds"], 1),
    }
    bench.report("product_killed_rows_ok", done.summary["ok"], "rows", bound=f"= {options.rows}", **more)


def open_bench(options: argparse.Namespace) -> Any:
    """Where figures go. The driver's process needs no torch until then."""
    import torch

    from benchmarks.int8_bench import Bench
    from ltx_batch.model.device import device_name, pick_device
    from ltx_batch.model.quantize.policy import precision

    device = torch.device("cpu") if options.tiny else pick_device("cuda")
    gpu = "tiny" if options.tiny else device_name(device).removeprefix("NVIDIA ").split()[0].lower()
    place = ROOT / ("out" if options.tiny else "benchmarks/results") / f"int8-{gpu}.json"
    policy = precision("int8", device.type, hadamard_group=options.hadamard_group, keep_blocks=options.keep_blocks)
    return Bench(device, policy, options.tiny, 1, options.output or place)


if __name__ == "__main__":
    main()
