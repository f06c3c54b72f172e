"""The same command again: after a finished run, a kill, a signal, a retry, or a picture that changed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from job_runs import (
    Driver,
    Fault,
    check_output,
    ledger_of,
    make_job,
    read_records,
    run_apart,
    until,
    write_manifest,
)
from kills import Victim, fault_and_finish, finish, kill_and_finish
from PIL import Image
from servers import S3Server

from ltx_batch.driver import RunOptions, run


def slow_rows(count: int, sleep_s: float = 0.15) -> list[str]:
    return [f"p{i} [sleep {sleep_s}]" for i in range(count)]


# nothing to do


def test_a_finished_run_renders_nothing_and_never_starts_ray(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, [f"p{i}" for i in range(9)]), tmp_path / "out")
    first = run(job)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    code, told = run_apart(job.model_copy(update={"workers": 2}))
    assert (code, told["run"], told["rendered"], told["reused"]) == (0, first.run, 0, 9)
    assert not told["ray_loaded"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_shards_whose_rows_are_all_committed_are_written_without_a_worker(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, [f"p{i}" for i in range(8)]), tmp_path / "out")
    name = run(job).run
    for line in (tmp_path / "out" / "runs" / name / "shards").iterdir():
        line.unlink()
    code, told = run_apart(job.model_copy(update={"workers": 2}))
    assert (code, told["rendered"], told["reused"], told["ray_loaded"]) == (0, 0, 8, False)
    check_output(job, name)


def test_a_record_that_a_disk_tore_does_not_count(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, ["a", "b"]), tmp_path / "out")
    name = run(job).run
    torn, _ = sorted((tmp_path / "out" / "videos").rglob("*.json"))
    torn.write_bytes(torn.read_bytes()[:40])
    for line in (tmp_path / "out" / "runs" / name / "shards").iterdir():
        line.unlink()
    assert run(job).rendered == 1
    check_output(job, name)


# kills


KILLS: list[list[tuple[Victim, int]]] = [[("actor", 2), ("driver", 6)], [("cluster", 3)]]


@pytest.mark.parametrize("kills", KILLS, ids=["actor-then-driver", "cluster"])
def test_a_killed_run_is_finished_by_the_same_command(tmp_path: Path, kills: list[tuple[Victim, int]]) -> None:
    job = make_job(write_manifest(tmp_path, slow_rows(16, 0.2)), tmp_path / "out", workers=2)
    kill_and_finish(job, *kills)


@pytest.mark.parametrize("kills", KILLS, ids=["actor-then-driver", "cluster"])
def test_so_is_one_on_an_object_store(tmp_path: Path, s3_server: S3Server, kills: list[tuple[Victim, int]]) -> None:
    job = make_job(write_manifest(tmp_path, slow_rows(16, 0.2)), s3_server.uri(), workers=2)
    kill_and_finish(job, *kills)


@pytest.mark.parametrize(
    ("operation", "name", "when", "nth"),
    [
        ("create", r"run\.json$", "after", 1),
        ("upload", r"\.mp4$", "before", 3),
        ("create", r"videos/.*\.json$", "before", 3),  # the video is up, its record is not
        ("create", r"videos/.*\.json$", "after", 8),  # committed, and nobody was told
        ("create", r"shards/", "before", 2),
        ("create", r"shards/", "after", 1),
    ],
)
def test_a_kill_at_an_exact_moment_loses_nothing(
    tmp_path: Path, operation: str, name: str, when: str, nth: int
) -> None:
    job = make_job(write_manifest(tmp_path, [f"p{i}" for i in range(10)]), tmp_path / "out")
    output = fault_and_finish(job, Fault(operation, name, tmp_path / "marker", when, nth))
    videos = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.mp4")}
    assert videos == {record.video for record in output.records.values()}, "a video without a record is found again"


def test_a_kill_between_video_and_record_on_an_object_store(tmp_path: Path, s3_server: S3Server) -> None:
    job = make_job(write_manifest(tmp_path, [f"p{i}" for i in range(6)]), s3_server.uri())
    fault_and_finish(job, Fault("create", r"videos/.*\.json$", tmp_path / "marker", "before", 2))


def test_a_worker_that_commits_and_dies_before_it_answers_is_not_charged(tmp_path: Path) -> None:
    """Ok wins. The first commit's actor is killed before it can tell; a row that it held besides runs again, alone."""
    job = make_job(
        write_manifest(tmp_path, slow_rows(4, 0.05)), tmp_path / "out", workers=1, attempts={"max_attempts": 1}
    )
    with Driver(job, fault=Fault("create", r"videos/.*\.json$", tmp_path / "marker", "after")) as driver:
        code, told = driver.result()
    assert (code, told["ok"], told["rendered"]) == (0, 4, 4) and (tmp_path / "marker").exists()
    output = check_output(job, told["run"])
    assert {line["ltx_attempts"] for line in output.lines} == {1}
    assert len({line["ltx_worker"] for line in output.lines}) == 2, "the actor was replaced"
    earliest = min(output.lines, key=lambda line: line["ltx_finished_at"])
    assert earliest["ltx_key"] not in ledger_of(job).attempts(told["run"])


# signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_drains_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    job = make_job(write_manifest(tmp_path, slow_rows(20, 0.1)), tmp_path / "out")
    with Driver(job) as driver:
        driver.commits(job, 4)
        driver.signal(number, group=True)
        code, told = driver.result()
    assert code == 3 and told["stopped"].startswith("drained") and 4 <= told["rendered"] < 20
    assert told["rendered"] == len(read_records(job)), "what was in flight was committed and counted"
    finish(job)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_at_once(tmp_path: Path, number: signal.Signals, expected: int) -> None:
    manifest = write_manifest(tmp_path, ["first", "second [sleep 60]", "third [sleep 60]"])
    job = make_job(manifest, tmp_path / "out", worker={"in_flight": 1})  # of two in flight the second may be the faster
    with Driver(job) as driver:
        driver.commits(job, 1)
        time.sleep(0.5)  # until then the worker has the second row
        driver.signal(number)
        time.sleep(0.3)  # two signals at once would be one
        assert driver.alive, "the first one drains"
        driver.signal(number)
        assert driver.process.wait(timeout=10) == expected


def test_a_signal_drains_actors_and_leaves_no_process_and_no_scratch(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, slow_rows(40, 0.1)), tmp_path / "out", workers=1)
    with Driver(job) as driver:
        driver.commits(job, 2)
        driver.signal(signal.SIGINT, group=True)  # as Ctrl-C in a terminal, which reaches the whole group
        code, told = driver.result()
        assert code == 3 and told["stopped"].startswith("drained") and told["failed"] == 0
        assert told["rendered"] == len(read_records(job)) < 40
        until(lambda: not driver.family(), timeout_s=20)
    assert driver.scratch.is_dir() and not list(driver.scratch.glob("ltx_batch-*"))


def test_a_signal_while_ray_starts_leaves_nothing_behind(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, ["a", "b"]), tmp_path / "out", workers=1)
    with Driver(job) as driver:
        until(lambda: driver.named("gcs_server"))
        driver.signal(signal.SIGTERM)
        code, told = driver.result()
        assert code == 3 and "the same command again goes on" in told["stopped"]
        until(lambda: not driver.family(), timeout_s=20)
    finish(job)


def test_a_row_that_hangs_in_this_process_ends_the_run_and_the_process(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, ["a", "b [hang]", "c"]), tmp_path / "out", attempts={"timeout_s": 1})
    code, told = run_apart(job)
    assert code == 3 and "attempts.timeout_s" in told["stopped"] and "workers: 0" in told["stopped"]


# retry


def test_retry_writes_a_new_epoch_and_keeps_what_was_ok(tmp_path: Path) -> None:
    prompts = [f"p{i}" for i in range(12)]
    prompts[1] = f"p1 [once {tmp_path}/a: raise] [once {tmp_path}/b: raise]"
    prompts[2] = "p2 [raise]"
    prompts[9] = f"p9 [once {tmp_path}/c: raise]"
    job = make_job(write_manifest(tmp_path, prompts), tmp_path / "out", attempts={"max_attempts": 1})
    first = run(job)
    assert (first.ok, first.failed) == (9, 3)
    before = check_output(job, first.run)
    assert run(job).rendered == 0, "a run alone does not try failed rows again"

    second = run(job, RunOptions(retry=True))
    after = check_output(job, first.run)
    assert (second.exit_code, second.ok, second.failed, second.rendered) == (1, 10, 2, 1)
    epochs = ledger_of(job).finished_shards(first.run)
    assert sorted(epochs.values()) == [0, 1, 1], "the shard without failed rows was not opened"
    kept = [line for line in before.lines if line["ltx_status"] == "ok"]
    assert all(line in after.lines for line in kept)
    assert before.attempt_ids().items() <= after.attempt_ids().items()

    third = run(job, RunOptions(retry=True))
    assert (third.ok, third.failed, third.rendered) == (11, 1, 1)
    last = check_output(job, first.run)
    numbers = ledger_of(job).attempts(first.run)
    assert [len(numbers[last.line(start)["ltx_key"]]) for start in ("p1", "p2", "p9")] == [2, 3, 1]
    assert sorted(ledger_of(job).finished_shards(first.run).values()) == [0, 1, 2]


def test_a_retry_that_is_killed_is_finished_by_a_retry(tmp_path: Path) -> None:
    prompts = [f"p{i} [once {tmp_path}/{i}: raise]" for i in range(8)]
    job = make_job(
        write_manifest(tmp_path, prompts), tmp_path / "out", attempts={"max_attempts": 1}, stop_after_failures=99
    )
    assert run(job).failed == 8
    fault = Fault("create", r"shards/.*\.1\.parquet", tmp_path / "marker", "before", 2)
    assert run_apart(job, fault=fault, retry=True)[0] == -9
    assert len(read_records(job)) >= 4
    code, told = run_apart(job, retry=True)
    assert (code, told["ok"]) == (0, 8)
    assert {line["ltx_attempts"] for line in check_output(job, told["run"]).lines} == {1}
    assert set(ledger_of(job).finished_shards(told["run"]).values()) == {1}


def test_an_earlier_driver_of_the_epoch_counts_towards_the_attempts(tmp_path: Path) -> None:
    prompts = ["bad [raise]", *slow_rows(3, 0.1)]
    job = make_job(write_manifest(tmp_path, prompts), tmp_path / "out", attempts={"max_attempts": 2})
    fault = Fault("create", r"attempts/", tmp_path / "marker", "after", 1)
    assert run_apart(job, fault=fault)[0] == -9
    summary = run(job)
    line = check_output(job, summary.run).line("bad")
    assert line["ltx_attempts"] == 2
    assert ledger_of(job).attempts(summary.run) == {line["ltx_key"]: [1, 2]}


# pictures that change


def test_check_media_renders_the_rows_whose_picture_changed(tmp_path: Path) -> None:
    for name, shade in (("a.png", 10), ("b.png", 60)):
        Image.fromarray(np.full((16, 16, 3), shade, np.uint8)).save(tmp_path / name)
    paths = [["a.png"], ["b.png"], None, None, ["b.png"], ["a.png"]]
    frames = [[0] if path else None for path in paths]
    manifest = write_manifest(
        tmp_path, [f"p{i}" for i in range(6)], conditioning_media_paths=paths, conditioning_start_frames=frames
    )
    job = make_job(manifest, tmp_path / "out", shard_rows=2)
    first = run(job)
    before = check_output(job, first.run)
    Image.fromarray(np.full((16, 20, 3), 90, np.uint8)).save(tmp_path / "b.png")
    assert run(job).rendered == 0, "a finished shard is not looked at again"

    second = run(job, RunOptions(check_media=True))
    assert (second.run, second.exit_code, second.rendered, second.ok) == (first.run, 0, 2, 6)
    after = check_output(job, first.run)
    changed = [new["ltx_key"] != old["ltx_key"] for new, old in zip(after.lines, before.lines, strict=True)]
    assert changed == [False, True, False, False, True, False]
    assert sorted(ledger_of(job).finished_shards(first.run).values()) == [0, 1, 1]
    assert run(job, RunOptions(check_media=True)).rendered == 0


def test_check_media_fails_the_rows_whose_picture_is_gone(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16, 3), 10, np.uint8)).save(tmp_path / "a.png")
    manifest = write_manifest(
        tmp_path, ["p0", "p1"], conditioning_media_paths=[["a.png"], None], conditioning_start_frames=[[0], None]
    )
    job = make_job(manifest, tmp_path / "out")
    first = run(job)
    (tmp_path / "a.png").unlink()
    assert run(job).exit_code == 0
    second = run(job, RunOptions(check_media=True, skip_invalid=True))
    assert (second.ok, second.failed) == (1, 1)
    assert "a.png" in check_output(job, first.run).line("p0")["ltx_error"]
