"""What the job's tests share: manifests, jobs, drivers in processes of their own, and the invariants of an output.

As a program, `job_runs.py JOB.json OPTIONS.json`, it is a driver that tells of every heartbeat on a line of its own and
ends with a line that holds the summary and whether Ray was loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from ltx_batch.driver import RunOptions, run
from ltx_batch.errors import LtxBatchError
from ltx_batch.job import JobSpec, parse_job
from ltx_batch.ledger import Ledger
from ltx_batch.manifest import Manifest
from ltx_batch.record import RenderRecord
from ltx_batch.worker import open_output

T = TypeVar("T")


def write_manifest(folder: Path, prompts: Sequence[str], **columns: Sequence[Any]) -> str:
    """A Parquet manifest of these prompts; every row has a seed of its own unless `seed` is given."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.parquet"
    pq.write_table(pa.table({"prompt": prompts, "seed": list(range(len(prompts))), **columns}), path)
    return str(path)


def make_job(manifest: str, output: str | Path, **changes: Any) -> JobSpec:
    """A job of tiny clips by the fake renderer, in this process unless `workers` says else. Sections are merged."""
    data: dict[str, Any] = {
        "manifest": manifest,
        "output": str(output),
        "model": {"renderer": "fake", "device": "cpu"},
        "workers": 0,
        "shard_rows": 4,
        "defaults": {"height": 32, "width": 32, "num_frames": 3, "frame_rate": 8},
        "video": {"preset": "ultrafast"},
    }
    for name, value in changes.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) and name in data else value
    return parse_job(data)


def ledger_of(job: JobSpec) -> Ledger:
    return Ledger(open_output(job))


# drivers in processes of their own


@dataclass(frozen=True)
class Fault:
    """The first process to do `operation` (a method of Storage) on the `nth` name that matches is killed then."""

    operation: str
    name: str
    marker: Path
    when: str = "before"
    nth: int = 1


def _environment(scratch: Path, fault: Fault | None, ray_address: str | None) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"TMPDIR": str(scratch), "RAY_TMPDIR": "/tmp"}  # Ray's sockets need a short path
    environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "10"  # Ray's agents outlive a killed cluster by that much
    if ray_address is not None:
        environment["RAY_ADDRESS"] = ray_address
    if fault is not None:
        places = [str(Path(__file__).with_name("faults")), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(place for place in places if place)
        environment["LTX_BATCH_FAULT"] = json.dumps(asdict(fault), default=str)
    return environment


class Driver:
    """A driver in a process of its own. Ends it, and all that it started, on leaving the block."""

    def __init__(
        self, job: JobSpec, *, fault: Fault | None = None, ray_address: str | None = None, **options: bool
    ) -> None:
        self._seen: dict[int, psutil.Process] = {}
        self.scratch = Path(job.manifest).parent / "scratch"
        self.scratch.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, __file__, job.model_dump_json(), json.dumps(options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            env=_environment(self.scratch, fault, ray_address),
        )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.family()
        for process in [psutil.Process(self.process.pid), *self._seen.values()] if self.alive else self._seen.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def family(self) -> list[psutil.Process]:
        """All processes that this driver started and that still run, whoever their parent is by now."""
        if self.alive:
            with suppress(psutil.NoSuchProcess):
                self._seen |= {child.pid: child for child in psutil.Process(self.process.pid).children(recursive=True)}
        return [process for process in self._seen.values() if _runs(process)]

    def named(self, *parts: str) -> list[psutil.Process]:
        """Its processes whose title holds one of these, e.g. raylet, gcs_server, ray::RenderActor."""
        return [process for process in self.family() if any(part in _title(process) for part in parts)]

    def commits(self, job: JobSpec, count: int) -> None:
        """Wait until so many records are there."""
        until(
            lambda: not self.alive or sum(name.endswith(".json") for name in open_output(job).list("videos")) >= count
        )
        assert self.alive, self.result()

    def kill(self) -> None:
        """SIGKILL to the driver alone."""
        self.family()
        self.process.kill()
        self.process.wait()

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        self.family()
        if group:  # as a terminal's Ctrl-C does
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def result(self, timeout_s: float = 60) -> tuple[int, dict[str, Any]]:
        """Exit code, and the last line that the driver printed."""
        out, err = self.process.communicate(timeout=timeout_s)
        lines = out.splitlines()
        assert lines or self.process.returncode, err
        return self.process.returncode, json.loads(lines[-1]) if lines else {"stderr": err}


def run_apart(job: JobSpec, **how: Any) -> tuple[int, dict[str, Any]]:
    """A whole run in a process of its own: exit code and summary, or error."""
    with Driver(job, **how) as driver:
        return driver.result()


def until(what: Callable[[], T], *, timeout_s: float = 60) -> T:
    """Wait for a true value."""
    deadline_s = time.monotonic() + timeout_s
    while not (value := what()):
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)
    return value


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1]) + " " + process.name()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


@contextmanager
def ray_cluster(**resources: Any) -> Iterator[None]:
    """A Ray of this process for drivers in this process."""
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=80 * 2**20,
        **resources,
    )
    try:
        yield
    finally:
        ray.shutdown()


# what must hold of an output


@dataclass(frozen=True)
class Output:
    """A run's lines in the manifest's order, and the records of its output by key."""

    lines: list[dict[str, Any]]
    records: dict[str, RenderRecord]

    def statuses(self) -> Counter[str]:
        return Counter(line["ltx_status"] for line in self.lines)

    def attempt_ids(self) -> dict[str, str | None]:
        return {key: record.attempt_id for key, record in self.records.items()}

    def line(self, word: str) -> dict[str, Any]:
        """The one line whose prompt has this first word."""
        (found,) = [line for line in self.lines if line["prompt"].split(" ")[0] == word]
        return found


def read_records(job: JobSpec) -> dict[str, RenderRecord]:
    storage = open_output(job)
    found = [RenderRecord.from_json(storage.read(name)) for name in storage.list("videos") if name.endswith(".json")]
    return {record.key: record for record in found}


def check_output(job: JobSpec, run_name: str) -> Output:
    """Every row in exactly one line of the latest epochs, every ok line's record there, every record's video whole."""
    ledger, manifest = ledger_of(job), Manifest.open(job.manifest)
    records = read_records(job)
    for record in records.values():
        assert record.ok and record.video is not None
        data = ledger.storage.read(record.video)
        assert hashlib.sha256(data).hexdigest() == record.sha256 and len(data) == record.video_bytes
    lines: list[dict[str, Any]] = []
    finished = ledger.finished_shards(run_name)
    for shard in manifest.shards(job.shard_rows):
        table = ledger.read_shard(run_name, shard.name, finished.pop(shard.name))
        assert table.select(manifest.read(shard).column_names).equals(manifest.read(shard))
        assert table.column("ltx_row").to_pylist() == list(range(shard.offset, shard.offset + shard.rows))
        lines += table.to_pylist()
    assert not finished and len(lines) == manifest.rows
    for line in lines:
        if line["ltx_status"] == "ok":
            record = records[line["ltx_key"]]
            assert (line["ltx_video"], line["ltx_sha256"]) == (record.video, record.sha256)
        else:
            assert line["ltx_status"] == "failed" and line["ltx_error_class"] and line["ltx_error"]
    return Output(lines, records)


def _main() -> int:
    job, options = parse_job(json.loads(sys.argv[1])), RunOptions(**json.loads(sys.argv[2]))
    try:
        summary = run(job, options, listen=lambda told: print(json.dumps(told.as_dict()), flush=True))
    except LtxBatchError as error:
        print(json.dumps({"error": str(error), "class": type(error).__name__}), flush=True)
        return error.exit_code
    print(json.dumps({**summary.as_dict(), "ray_loaded": "ray" in sys.modules}), flush=True)
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(_main())
