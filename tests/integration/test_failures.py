"""Rows that fail in every way there is: each ends with its reason, and nobody else pays."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from job_runs import Output, check_output, ledger_of, make_job, ray_cluster, write_manifest
from PIL import Image

from ltx_batch.driver import run
from ltx_batch.job import JobSpec
from ltx_batch.tally import Summary


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray_cluster(num_cpus=2):
        yield


@dataclass(frozen=True)
class Faulty:
    job: JobSpec
    summary: Summary
    output: Output
    attempts: dict[str, list[dict[str, Any]]]

    def tries(self, start: str) -> list[dict[str, Any]]:
        """What was written down of the row whose prompt starts so."""
        return self.attempts.get(self.output.line(start)["ltx_key"], [])


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    """One run on two actors with every fault among healthy rows."""
    folder = tmp_path_factory.mktemp("faulty")
    faults = [
        "raises [raise]",
        "hopeless [raise MediaError]",
        "exits [exit 3]",
        "segfaults [segfault]",
        "hangs [hang]",
        f"passes [once {folder}/exit: exit 3]",
        f"stumbles [once {folder}/raise: raise]",
    ]
    good = [f"good {i} [sleep 0.05]" for i in range(14)]
    prompts = [row for pair in zip(good[:7], faults, strict=True) for row in pair] + good[7:]
    job = make_job(
        write_manifest(folder, prompts),
        folder / "out",
        workers=2,
        attempts={"timeout_s": 2.5, "max_attempts": 3, "max_deaths": 2, "max_worker_deaths": 20},
    )
    summary = run(job)
    ledger = ledger_of(job)
    attempts = {
        key: [ledger.read_attempt(summary.run, key, number) for number in numbers]
        for key, numbers in ledger.attempts(summary.run).items()
    }
    return Faulty(job, summary, check_output(job, summary.run), attempts)


def test_all_other_rows_finish(faulty: Faulty) -> None:
    assert (faulty.summary.exit_code, faulty.summary.ok, faulty.summary.failed) == (1, 16, 5)
    assert {line["ltx_status"] for line in faulty.output.lines if line["prompt"].startswith("good")} == {"ok"}


def test_neighbours_are_not_charged(faulty: Faulty) -> None:
    good = [line for line in faulty.output.lines if line["prompt"].startswith("good")]
    assert {line["ltx_attempts"] for line in good} == {1}
    assert {record.attempts for record in (faulty.output.records[line["ltx_key"]] for line in good)} == {1}
    written = [fact for line in good for fact in faulty.attempts.get(line["ltx_key"], [])]
    assert not any(fact["charged"] for fact in written), "what a death cost a neighbour is noted, and not charged"


def test_a_row_that_raises_uses_its_attempts(faulty: Faulty) -> None:
    line = faulty.output.line("raises")
    assert (line["ltx_error_class"], line["ltx_attempts"]) == ("RuntimeError", 3)
    assert "scripted fault" in line["ltx_error"] and "fake.py" in line["ltx_error"], "says where a foreign error arose"
    assert [fact["attempt"] for fact in faulty.tries("raises")] == [1, 2, 3]


def test_a_hopeless_row_is_not_tried_again(faulty: Faulty) -> None:
    line = faulty.output.line("hopeless")
    assert (line["ltx_error_class"], line["ltx_attempts"]) == ("MediaError", 1)
    assert len(faulty.tries("hopeless")) == 1


@pytest.mark.parametrize("start", ["exits", "segfaults"])
def test_a_row_that_ends_its_process_is_given_up(faulty: Faulty, start: str) -> None:
    line = faulty.output.line(start)
    assert (line["ltx_error_class"], line["ltx_attempts"]) == ("WorkerDied", 2)
    assert [fact["cause"] for fact in faulty.tries(start) if fact["charged"]] == ["crash", "crash"]
    assert line["ltx_error"].startswith("the process ended: out of memory, a crash") and len(line["ltx_error"]) < 400


def test_a_row_that_hangs_is_given_up(faulty: Faulty) -> None:
    line = faulty.output.line("hangs")
    assert (line["ltx_error_class"], line["ltx_attempts"]) == ("RowTimeout", 2)
    assert "attempts.timeout_s" in line["ltx_error"]


@pytest.mark.parametrize("start", ["passes", "stumbles"])
def test_a_fault_that_passes_ends_ok(faulty: Faulty, start: str) -> None:
    line = faulty.output.line(start)
    assert line["ltx_status"] == "ok"
    assert line["ltx_attempts"] == 1 + sum(fact["charged"] for fact in faulty.tries(start))
    assert faulty.tries(start)


def test_the_summary_names_the_errors(faulty: Faulty) -> None:
    told = " ".join(message for message, _ in faulty.summary.top_errors)
    assert {name for name in ("RuntimeError", "MediaError", "WorkerDied", "RowTimeout") if name in told} == {
        "RuntimeError", "MediaError", "WorkerDied", "RowTimeout",
    }  # fmt: skip


def test_a_resumed_run_with_failed_rows_leaves_them(faulty: Faulty) -> None:
    again = run(faulty.job)
    assert (again.exit_code, again.rendered, again.failed) == (1, 0, 5)


def test_a_batch_that_dies_or_raises_costs_only_the_guilty_row(tmp_path: Path) -> None:
    prompts = [f"good {i}" for i in range(6)]
    prompts[1], prompts[4] = "exits [exit 3]", "raises [raise]"
    job = make_job(
        write_manifest(tmp_path, prompts),
        tmp_path / "out",
        workers=1,
        batch_size=3,
        attempts={"max_attempts": 2, "max_deaths": 1},
    )
    summary = run(job)
    output = check_output(job, summary.run)
    assert (summary.ok, summary.failed) == (4, 2)
    assert (output.line("exits")["ltx_error_class"], output.line("exits")["ltx_attempts"]) == ("WorkerDied", 1)
    assert (output.line("raises")["ltx_error_class"], output.line("raises")["ltx_attempts"]) == ("RuntimeError", 2)
    assert {line["ltx_attempts"] for line in output.lines if line["prompt"].startswith("good")} == {1}


def test_a_cluster_where_no_model_loads_stops_the_run_with_the_reason(tmp_path: Path) -> None:
    job = _broken_checkpoint(tmp_path, workers=1)
    summary = run(job)
    assert summary.exit_code == 3 and summary.stopped is not None
    assert "no worker can start: CheckpointError" in summary.stopped and "transformer" in summary.stopped


def test_so_does_a_model_that_does_not_load_in_this_process(tmp_path: Path) -> None:
    job = _broken_checkpoint(tmp_path, workers=0)
    summary = run(job)
    assert summary.exit_code == 3 and "no worker can start: CheckpointError" in (summary.stopped or "")


def _broken_checkpoint(folder: Path, workers: int) -> JobSpec:
    from tiny_checkpoint import write_tiny_checkpoint

    checkpoint = folder / "checkpoint"
    write_tiny_checkpoint(checkpoint)
    for weights in (checkpoint / "transformer").glob("*.safetensors"):
        weights.write_bytes(b"not weights")
    return make_job(
        write_manifest(folder, ["a"]),
        folder / "out",
        workers=workers,
        model={"renderer": "ltx", "checkpoint": str(checkpoint), "precision": "fp32"},
    )


def test_the_breaker_stops_a_run_that_cannot_work(tmp_path: Path) -> None:
    job = make_job(
        write_manifest(tmp_path, [f"p{i} [raise MediaError]" for i in range(40)]),
        tmp_path / "out",
        stop_after_failures=5,
    )
    summary = run(job)
    assert (summary.exit_code, summary.ok) == (3, 0) and 5 <= summary.failed < 12
    assert "stop_after_failures" in (summary.stopped or "")
    assert len(list((tmp_path / "out").rglob("attempts/*.json"))) < 12


def test_the_breaker_forgets_what_an_earlier_call_saw(tmp_path: Path) -> None:
    """Five rows failed in a finished shard and stopped the run; the same command goes on with the other rows."""
    prompts = [f"p{i} [raise MediaError]" for i in range(5)] + [f"q{i} [sleep 0.01]" for i in range(5)]
    job = make_job(write_manifest(tmp_path, prompts), tmp_path / "out", stop_after_failures=5, shard_rows=5)
    assert run(job).exit_code == 3
    assert run(job).exit_code == 1


# conditioning media


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    for name, shade in (("good.png", 40), ("changed.png", 80), ("vanishes.png", 120)):
        Image.fromarray(np.full((16, 16, 3), shade, np.uint8)).save(folder / name)
    _write_undecodable(folder / "spoilt.png")
    return folder


def _write_undecodable(path: Path) -> None:
    """A PNG whose checksums are right and whose pixels are not: `validate`, which decodes none, finds nothing wrong."""
    chunks = {b"IHDR": struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0), b"IDAT": b"no pixels", b"IEND": b""}
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_conditioning_files_fail_their_rows_without_retry(tmp_path: Path, pictures: Path, workers: int) -> None:
    """One cannot be decoded, one is gone and one is another picture by the time the worker fetches it."""
    names = ["good.png", "spoilt.png", "changed.png", "vanishes.png"]
    paths = [[f"media/{name}"] for name in names] + [None]
    manifest = write_manifest(
        tmp_path, [*names, "none"], conditioning_media_paths=paths, conditioning_start_frames=[[0]] * 4 + [None]
    )
    job = make_job(manifest, tmp_path / "out", workers=workers, shard_rows=5)

    def meddle(_: Summary) -> None:
        """All rows of the shard have been hashed by now, and no worker is ready yet."""
        (pictures / "vanishes.png").unlink(missing_ok=True)
        shutil.copy(pictures / "good.png", pictures / "changed.png")

    summary = run(job, listen=meddle)
    output = check_output(job, summary.run)
    assert (summary.exit_code, summary.ok, summary.failed) == (1, 2, 3)
    for name, reason in (("spoilt.png", "spoilt.png"), ("changed.png", "changed after"), ("vanishes.png", "not exist")):
        line = output.line(name)
        assert (line["ltx_error_class"], line["ltx_attempts"]) == ("MediaError", 1) and reason in line["ltx_error"]


def test_a_file_that_is_missing_when_its_shard_opens_fails_its_row(tmp_path: Path, pictures: Path) -> None:
    rows = 12
    paths = [["media/good.png"]] * (rows - 1) + [["media/vanishes.png"]]
    manifest = write_manifest(
        tmp_path,
        [f"p{i} [sleep 0.01]" for i in range(rows)],
        conditioning_media_paths=paths,
        conditioning_start_frames=[[0]] * rows,
    )
    job = make_job(manifest, tmp_path / "out", shard_rows=1)
    (pictures / "vanishes.png").rename(pictures / "gone.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ltx_batch.manifest.media.MAX_LOOKUPS", 0)  # as for the paths beyond the first 100,000
        patch.setattr("ltx_batch.manifest.media.MediaLookup._look", lambda self, uris: None)
        summary = run(job)
    line = check_output(job, summary.run).line("p11")
    assert (summary.ok, line["ltx_error_class"], line["ltx_attempts"]) == (11, "MediaError", 0)
    assert "there is no file" in line["ltx_error"]
