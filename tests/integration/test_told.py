"""What a user is told of runs that never were, are over, or were cut short."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from job_runs import ledger_of, make_job, read_records, write_manifest

from ltx_batch.cli import main
from ltx_batch.driver import run
from ltx_batch.job import JobSpec
from ltx_batch.record import RenderRecord
from ltx_batch.report.status import run_status


def job_file(folder: Path, prompts: list[str], **changes: Any) -> tuple[str, JobSpec]:
    """Equal prompts are equal rows."""
    job = make_job(
        write_manifest(folder, prompts, seed=[7] * len(prompts)),
        folder / "out",
        attempts={"max_attempts": 1},
        video={"codec": "fake"},
        **changes,
    )
    file = folder / "job.yaml"
    file.write_text(job.model_dump_json())
    return str(file), job


def test_there_is_nothing_to_retry_before_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = job_file(tmp_path, ["one", "two"])
    assert main(["retry", file]) == 2
    assert "was not run into" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.json")), "nothing was started"


def test_there_is_nothing_to_retry_where_no_row_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = job_file(tmp_path, ["fine", f"once [once {tmp_path}/marker: raise]"])
    assert main(["run", file]) == 1
    assert main(["run", file]) == 1
    assert capsys.readouterr().out.count("no row is left to render") == 1
    assert main(["retry", file]) == 0
    assert "nothing to retry" not in capsys.readouterr().out
    assert main(["retry", file]) == 0
    assert "no row has failed: there is nothing to retry" in capsys.readouterr().out
    assert main(["retry", file, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["idle"] is True and (told["ok"], told["rendered"]) == (2, 0)


def test_equal_rows_of_a_first_run_are_not_from_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _ = job_file(tmp_path, ["one", "two", "one"])
    assert main(["run", file]) == 0
    assert "3 rows: 3 ok (2 rendered, 1 reused), 0 failed" in capsys.readouterr().out


def test_only_a_failure_is_retryable_or_not(tmp_path: Path) -> None:
    _, job = job_file(tmp_path, ["one"])
    run(job)
    (record,) = read_records(job).values()
    assert "retryable" not in json.loads(record.to_json())
    failed = RenderRecord(key="k", status="failed", retryable=False)
    assert RenderRecord.from_json(failed.to_json()) == failed


@pytest.fixture
def killed(tmp_path: Path) -> tuple[str, JobSpec]:
    """Three of four shards are finished, and the heartbeat was written after the first."""
    file, job = job_file(tmp_path, ["one", "two", "one", "broken [raise]"], shard_rows=1, gpu_hour_price=1.0)
    told = run(job)
    shards = sorted((tmp_path / "out" / "runs" / told.run / "shards").iterdir())
    shards[1].unlink()
    beat = {**told.as_dict(), "ok": 1, "failed": 0, "rendered": 1, "reused": 0, "shards_done": 1}
    beat |= {"rows_per_s": 0.7, "eta_s": 9.0, "workers": 1, "gpu_seconds": 77.0, "top_errors": []}
    ledger_of(job).write_status(told.run, {**beat, "at_unix_s": time.time() - 300})
    return file, job


def test_status_of_a_killed_run_is_from_one_source(
    killed: tuple[str, JobSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    file, job = killed
    found = run_status(job)
    assert (found.state, found.source) == ("silent", "shards")
    assert (found.ok, found.failed, found.rendered, found.reused, found.shards_done) == (2, 1, 1, 1, 3)
    assert (found.gpu_seconds, found.cost, found.seconds, found.rows_per_s, found.workers) == (0.0, 0.0, None, 0.0, 0)
    assert found.heartbeat_age_s is not None and found.heartbeat_age_s >= 300
    assert found.top_errors[0][1] == 1
    assert main(["status", file]) == 0
    printed = capsys.readouterr().out
    assert "silent, last heartbeat 5 min" in printed and "the driver seems dead" in printed
    assert (
        "4 rows: 2 ok (1 rendered, 1 reused), 1 failed, cost 0.00, in finished shards: the heartbeat is older"
        in printed
    )


def test_status_by_a_heartbeat_that_knows_more_says_how_old_it_is(
    killed: tuple[str, JobSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of open shards are in no file that can be counted."""
    file, job = killed
    ledger = ledger_of(job)
    found = run_status(job)
    assert found.run is not None
    beat = ledger.read_status(found.run)
    assert beat is not None
    ledger.write_status(found.run, {**beat, "ok": 3, "rendered": 2, "seconds": 50.0})
    found = run_status(job)
    assert (found.state, found.source) == ("silent", "heartbeat")
    assert (found.ok, found.failed, found.rendered, found.reused, found.gpu_seconds) == (3, 0, 2, 1, 77.0)
    assert (found.rows_per_s, found.eta_s, found.workers) == (0.0, None, 0), "of a driver that is no more"
    assert main(["status", file]) == 0
    assert "3 ok (2 rendered, 1 reused), 0 failed, in 50.0 s, 0.02 GPU-hours" in (told := capsys.readouterr().out)
    assert "as of that heartbeat" in told


def test_status_of_a_retry_that_goes_on(tmp_path: Path) -> None:
    """The shards of the epoch before are all there, and tell less than the heartbeat."""
    _, job = job_file(tmp_path, ["one", "two", "broken [raise]"])
    told = run(job)
    beat = {**told.as_dict(), "failed": 0, "workers": 2, "at_unix_s": time.time()}
    ledger_of(job).write_status(told.run, beat)
    found = run_status(job)
    assert (found.state, found.source, found.workers, found.ok, found.failed) == ("running", "heartbeat", 2, 2, 0)


def test_a_report_of_an_unfinished_run_says_what_it_leaves_out(
    killed: tuple[str, JobSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = killed
    assert main(["report", file]) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 rows ok" in printed and "not finished: 1 more rows are in no finished shard yet" in printed
    assert main(["report", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unfinished"] == 1
