"""The command line's verbs over a real output, in this process: exit codes, the JSON line, what is printed."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from ltx_batch.cli import main, submit
from ltx_batch.ledger import Ledger
from ltx_batch.storage import Storage

RUN_KEYS = {"run", "rows", "ok", "failed", "rendered", "reused", "seconds", "gpu_seconds", "cost"}


def write_job(folder: Path, *prompts: str, columns: dict[str, Any] | None = None, **changes: Any) -> str:
    rows = {"prompt": list(prompts), "row_id": [f"row-{i}" for i in range(len(prompts))], **(columns or {})}
    pq.write_table(pa.table(rows), folder / "rows.parquet")
    job = {
        "manifest": str(folder / "rows.parquet"),
        "output": str(folder / "out"),
        "model": {"renderer": "fake", "device": "cpu"},
        "workers": 0,
        "defaults": {"height": 32, "width": 32, "num_frames": 3, "frame_rate": 8},
        "attempts": {"max_attempts": 1},
        "video": {"codec": "fake"},
        **changes,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return str(path)


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def next_line(printed: str) -> str:
    (line,) = [line for line in printed.splitlines() if line.startswith("next     ")]
    return line


def test_run_ends_with_its_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, "one", "two", gpu_hour_price=3.0)
    assert main(["run", job, "--json"]) == 0
    summary = last_json(capsys)
    assert summary.keys() >= RUN_KEYS
    assert [summary[name] for name in ("rows", "ok", "failed", "rendered", "reused")] == [2, 2, 0, 2, 0]
    assert summary["cost"] == 0.0, "a fake renderer holds no GPU"
    assert main(["run", job, "--json"]) == 0
    again = last_json(capsys)
    assert again["run"] == summary["run"]
    assert (again["rendered"], again["reused"]) == (0, 2)


def test_submit_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit([write_job(tmp_path, "one"), "--json"]) == 0
    assert last_json(capsys)["rendered"] == 1


def test_run_says_where_things_are_and_what_to_type_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, "one", "broken [raise]")
    assert main(["run", job, "--set", "defaults.num_frames=5"]) == 1
    printed, told = capsys.readouterr()
    assert "2 rows: 1 ok (1 rendered, 0 reused), 1 failed" in printed
    assert "1 x RuntimeError: scripted fault" in printed
    assert f"videos   {tmp_path}/out/videos/" in printed
    shards = re.search(r"rows     (\S+)\*\.parquet", printed)
    assert shards is not None
    assert list(Path(shards[1]).glob("*.parquet"))
    assert f"ltx-batch retry {job} --set defaults.num_frames=5" in next_line(printed)
    assert "2/2 rows, 1 failed, 1/1 shards" in told


def test_failed_rows_may_count_as_success(tmp_path: Path) -> None:
    job = write_job(tmp_path, "broken [raise]", "fine")
    assert main(["run", job]) == 1
    assert main(["run", job, "--set", "on_failed_rows=exit0"]) == 0


def test_breaker_stops_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, *["broken [raise]"] * 4, stop_after_failures=2, on_failed_rows="exit0")
    assert main(["run", job, "--json"]) == 3, "on_failed_rows says nothing of runs that did not end"
    assert "stop_after_failures" in last_json(capsys)["stopped"]


def test_retry_tries_failed_rows_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marker = tmp_path / "marker"
    job = write_job(tmp_path, "fine", f"once [once {marker}: raise]")
    assert main(["run", job]) == 1
    assert main(["run", job]) == 1, "a finished shard is not looked at again"
    capsys.readouterr()
    assert main(["retry", job, "--json"]) == 0
    summary = last_json(capsys)
    assert (summary["ok"], summary["failed"], summary["rendered"]) == (2, 0, 1)


def test_uris_on_the_command_line_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever characters they hold: they are no YAML."""
    job = write_job(tmp_path, "one", manifest="absent.parquet", output="absent")
    odd = tmp_path / "a: [b] #c"
    odd.mkdir()
    (tmp_path / "rows.parquet").rename(odd / "rows.parquet")
    assert main(["run", job, "--manifest", str(odd / "rows.parquet"), "--output", str(odd / "out"), "--json"]) == 0
    assert (odd / "out" / "runs" / last_json(capsys)["run"] / "run.json").is_file()


def test_job_from_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(write_job(tmp_path, "one")).read_text()
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert main(["run", "-"]) == 0
    assert "ltx-batch report JOB.yaml" in next_line(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "{folder}/absent.yaml"], "no job file at"),
        (["run", "{job}", "--set", "model.precison=bf16"], "did you mean model.precision?"),
        (["run", "{job}", "--set", "workers"], "write it as key=value"),
        (["run", "{job}", "--manifest", "{folder}/absent.parquet"], "absent.parquet"),
        (["run", "{job}", "--nonsense"], "No such option"),
        (["run", "{job}", "--nonsense"], "`ltx-batch run --help` lists the options"),
        (["run"], "Missing argument"),
        (["rnu", "{job}"], "No such command"),
        (["run", "{job}", "--address", "ray://head:10001"], "give the address of Ray's job server"),
        (["report", "{job}"], "no finished shard of this job yet"),
        (["quality", "{folder}", "{folder}", "-o", "{job}/new"], "is no folder that can be written to"),
        (["quantize", "demo", "{job}/new"], "is no folder that can be written to"),
        (["render", "a red circle", "-o", "{job}/clip.mp4"], "is no folder that can be written to"),
        (["render", "a red circle", "-o", "clip.gif"], "ends in .mp4 or .png"),
        (["render", "a red circle", "-o", "clip.mp4", "--height", "63"], "must be even"),
        (["render", "a red circle", "-o", "clip.mp4", "--image", "{folder}/absent.png"], "there is no file"),
    ],
)
def test_bad_input_exits_2_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    job = write_job(tmp_path, "one")
    words = [word.format(folder=tmp_path, job=job) for word in words]
    assert main([*words, "--json"]) == 2
    printed, told = capsys.readouterr()
    assert said in json.loads(printed.splitlines()[-1])["error"]
    assert said in told
    assert "Traceback" not in told
    assert not (tmp_path / "out").exists(), "nothing was started"


@pytest.mark.parametrize(("path", "start"), [("{bin}:/usr/bin", "ltx-batch"), ("/usr/bin", "{bin}/ltx-batch")])
def test_what_to_type_next_is_found_by_the_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, path: str, start: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", path.format(bin=folder))
    job = write_job(tmp_path, "one")
    assert main(["status", job]) == 0
    assert next_line(capsys.readouterr().out) == f"next     {start.format(bin=folder)} run {job}"


def test_submit_without_its_libraries_says_what_to_do(tmp_path: Path) -> None:
    """As with a Python that is not .venv's."""
    root = Path(__file__).resolve().parents[2]
    bare = [sys.executable, "-S", str(root / "submit.py"), "job.yaml"]  # -S: no site-packages
    result = subprocess.run(bare, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2
    assert "make install" in result.stderr
    assert "Traceback" not in result.stderr


def test_http_ray_address_is_caught(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert main(["run", write_job(tmp_path, "one"), "--set", "workers=1"]) == 2
    assert "--address http://head:8265" in capsys.readouterr().err


def test_an_error_nobody_foresaw_is_no_failed_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's own exit code 1 would say that the job ran to its end."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("ltx_batch.driver.run_id", broken)
    assert main(["run", write_job(tmp_path, "one"), "--json"]) == 3
    printed, told = capsys.readouterr()
    assert json.loads(printed) == {"error": "ZeroDivisionError: by zero"}
    assert "Traceback" in told


def test_validate_lists_every_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, "fine", "", "odd", columns={"height": [32, 32, 33]})
    assert main(["validate", job, "--json"]) == 2
    found = last_json(capsys)
    assert found["rows"] == 3
    assert [(error["row"], error["row_id"], error["column"]) for error in found["errors"]] == [
        (1, "row-1", "prompt"),
        (2, "row-2", "height"),
    ]
    assert set(found["errors"][0]) == {"file", "row", "row_id", "column", "value", "rule"}
    assert main(["validate", job]) == 2
    printed = capsys.readouterr().out
    assert "rows.parquet row 1 (row-1), prompt" in printed
    assert printed.endswith("3 rows, 2 errors, 0 warnings\n")
    assert main(["validate", job, "--skip-invalid"]) == 0
    assert not (tmp_path / "out").exists()


def test_run_refuses_bad_rows_unless_they_may_be_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, "fine", "")
    assert main(["run", job, "--json"]) == 2
    refused = last_json(capsys)
    assert [error["row"] for error in refused["errors"]] == [1]
    assert "--skip-invalid" in refused["error"]
    assert main(["run", job, "--skip-invalid", "--json"]) == 1
    printed, told = capsys.readouterr()
    summary = json.loads(printed)
    assert (summary["ok"], summary["failed"]) == (1, 1)
    assert "ltx-batch validate" in next_line(told), "another try helps no row that breaks a rule"
    assert main(["status", job]) == 0
    assert "ltx-batch validate" in next_line(capsys.readouterr().out)


def test_status_from_the_output_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, "fine", "broken [raise]", gpu_hour_price=1.0)
    assert main(["status", job, "--json"]) == 0
    before = last_json(capsys)
    assert before.keys() >= RUN_KEYS
    assert (before["state"], before["rows"], before["ok"]) == ("not started", 2, 0)
    assert main(["run", job]) == 1
    capsys.readouterr()
    assert main(["status", job, "--json"]) == 0
    after = last_json(capsys)
    assert after["run"] == before["run"]
    assert [after[name] for name in ("state", "ok", "failed", "rendered")] == ["finished", 1, 1, 1]
    assert after["top_errors"][0][1] == 1
    assert 0 <= after["heartbeat_age_s"] < 60
    assert main(["status", job]) == 0
    printed = capsys.readouterr().out
    assert "finished, last heartbeat" in printed
    assert f"ltx-batch retry {job}" in next_line(printed)


@pytest.mark.parametrize(("age_s", "said"), [(3, "running, last heartbeat 3."), (300, "the driver seems dead")])
def test_status_tells_a_live_driver_from_a_dead_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], age_s: float, said: str
) -> None:
    job = write_job(tmp_path, "fine", "broken [raise]")
    main(["status", job, "--json"])
    run = last_json(capsys)["run"]
    beat = {"rows": 2, "ok": 1, "failed": 0, "rendered": 1, "seconds": 9.5, "gpu_seconds": 0.0, "cost": None}
    beat |= {"rows_per_s": 0.5, "eta_s": 2.0, "workers": 1, "stopped": None, "top_errors": []}
    Ledger(Storage(str(tmp_path / "out"))).write_status(run, {**beat, "at_unix_s": time.time() - age_s})
    assert main(["status", job]) == 0
    printed = capsys.readouterr().out
    assert said in printed
    assert "2 rows: 1 ok (1 rendered, 0 reused), 0 failed, in 9.5 s" in printed
    assert ("0.50 rows/s, 1 workers, 2.0 s left" in printed) == (age_s < 60)


def test_status_without_the_checkpoint_finds_the_latest_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write_job(tmp_path, "fine")
    assert main(["run", job, "--json"]) == 0
    run = last_json(capsys)["run"]
    elsewhere = ["--set", "model.renderer=ltx", "--set", f"model.checkpoint={tmp_path}/absent"]
    assert main(["status", job, *elsewhere, "--json"]) == 0
    assert last_json(capsys)["run"] == run
