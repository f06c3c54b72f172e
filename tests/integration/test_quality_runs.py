"""Two real runs side by side: every row is compared or listed with its reason, and the folder holds what it says."""

from __future__ import annotations

import io
import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from job_runs import ledger_of, make_job, write_manifest
from PIL import Image
from servers import S3Server

from ltx_batch.cli import main
from ltx_batch.driver import run
from ltx_batch.errors import JobError, RunStopped
from ltx_batch.job import JobSpec
from ltx_batch.quality import METRICS, RunsQuality, compare_runs, write_report
from ltx_batch.quality.runs import _in_processes
from ltx_batch.quality.summary import worst_first
from ltx_batch.storage import Storage

SIZE = {"height": 64, "width": 64, "num_frames": 3, "frame_rate": 8}


def rendered(folder: Path, output: str | Path, prompts: list[str], **columns: list[Any]) -> tuple[JobSpec, str]:
    """A finished run of colour bars, which the seed shifts: the job and the run's name."""
    job = make_job(
        write_manifest(folder, prompts, **columns), output, defaults=SIZE, attempts={"max_attempts": 1}, shard_rows=3
    )
    return job, run(job).run


def video_of(job: JobSpec, run_name: str, row: int) -> Path:
    shards = sorted(ledger_of(job).finished_shards(run_name).items())
    lines = [line for name, epoch in shards for line in ledger_of(job).read_shard(run_name, name, epoch).to_pylist()]
    return Path(job.output, lines[row]["ltx_video"])


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A: rows r0 to r7; B: r1 with another seed, r2 longer, r3 larger, r4 failed, r5 broken on the disk, r7 and r8."""
    folder = tmp_path_factory.mktemp("quality")
    names = [f"r{row}" for row in range(8)]
    rendered(folder / "a", folder / "out_a", names, row_id=names, seed=[0] * 8)
    names = [*names[:6], "r7", "r8"]
    prompts = [*names[:4], "r4 [raise]", *names[5:]]
    columns = {"num_frames": [3, 3, 5, 3, 3, 3, 3, 3], "height": [64, 64, 64, 96, 64, 64, 64, 64]}
    job, name = rendered(
        folder / "b", folder / "out_b", prompts, row_id=names, seed=[0, 5, 0, 0, 0, 9, 0, 0], **columns
    )
    video_of(job, name, 5).write_bytes(b"no video")
    return str(folder / "out_a"), str(folder / "out_b")


@pytest.fixture(scope="module")
def found(outputs: tuple[str, str]) -> RunsQuality:
    return compare_runs(*outputs, workers=0)


def test_every_row_is_compared_or_says_why_not(found: RunsQuality) -> None:
    assert found.joined_by == "row_id"
    assert {row.pair.name: row.reason for row in found.rows} == {
        "r0": None,
        "r1": None,
        "r2": "differs",
        "r3": "differs",
        "r4": "failed",
        "r5": "unreadable",
        "r6": "only in A",
        "r7": None,
        "r8": "only in B",
    }
    details = {row.pair.name: row.detail for row in found.rows}
    assert details["r2"] == "3 frames against 5"
    assert details["r3"] == "64x64 pixels against 64x96"
    assert details["r4"] == "in B: RuntimeError: scripted fault: RuntimeError"
    assert details["r5"] is not None and details["r5"].startswith("in B: ")
    assert not found.unavailable


def test_equal_rows_are_equal_and_others_are_not(found: RunsQuality) -> None:
    by_name = {row.pair.name: row for row in found.rows}
    for name in ("r0", "r7"):
        equal = by_name[name].quality
        assert equal is not None and by_name[name].pair.same_frames is True
        assert equal.psnr is not None and equal.ssim is not None and equal.lpips is not None and equal.vmaf is not None
        assert (equal.psnr.mean, equal.lpips.mean, equal.identical_frames) == (60, 0, 3)
        assert equal.ssim.worst == pytest.approx(1) and equal.vmaf.mean > 97
    other = by_name["r1"].quality
    assert other is not None and by_name["r1"].pair.same_frames is False
    assert other.psnr is not None and other.ssim is not None and other.lpips is not None and other.vmaf is not None
    assert other.psnr.mean < 15 and other.ssim.mean < 0.9 and other.lpips.mean > 0.02 and other.vmaf.mean < 80


@pytest.fixture(scope="module")
def folder(found: RunsQuality, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison, written over an earlier one that had more pictures."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "worst").mkdir()
    (folder / "worst" / "09.png").write_bytes(b"of an earlier comparison")
    report = write_report(found, str(folder))
    assert report.files == ("quality.json", "quality.parquet", "plot.png", "worst/01.png")
    assert (report.folder, report.notes) == (str(folder), ())
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == sorted(report.files)
    return folder


def test_the_folder_holds_what_it_says(folder: Path) -> None:
    told = json.loads((folder / "quality.json").read_text())
    assert pq.read_table(folder / "quality.parquet").to_pylist() == told["lines"]
    assert [line["row_id"] for line in told["lines"]] == [f"r{row}" for row in range(9)]
    assert told["skipped"] == {"differs": 2, "failed": 1, "unreadable": 1, "only in A": 1, "only in B": 1}
    assert (told["rows"], told["compared"], told["identical"], told["same_frames"]) == (9, 3, 2, 2)
    assert told["metrics"].keys() == METRICS.keys()
    assert all(one["worst_row"] == one["worst_frame_row"] == "r1" for one in told["metrics"].values())
    assert told["metrics"]["psnr"]["median"] == 60
    plot = Image.open(folder / "plot.png").convert("RGB")
    blue = np.abs(np.asarray(plot).astype(int) - (0x25, 0x63, 0xA8)).max(axis=-1) < 8
    quarters = np.array_split(blue, len(METRICS))
    assert all(quarter.sum() > 500 for quarter in quarters), "each metric has its bars and dots"


def test_the_worst_pair_is_shown(folder: Path) -> None:
    """Bars of 8 pixels, drawn at four times their size; B's are shifted by 5."""
    sheet = np.asarray(Image.open(folder / "worst" / "01.png").convert("RGB")).astype(int)
    assert sheet.shape == (8 + 3 * 20 + 256 + 8, 3 * 256 + 4 * 8, 3)
    a, b, difference = (sheet[68:324, 8 + n * 264 :][:, :256] for n in range(3))
    assert np.abs(np.roll(a, -5 * 4, axis=1)[:, 40:200] - b[:, 40:200]).max() < 80, "the same bars, further left"
    assert np.abs(a - b).max() > 200
    assert (difference >= np.abs(a - b) - 1).all(), "amplified"


def test_lines_say_where_things_are(found: RunsQuality, outputs: tuple[str, str]) -> None:
    line = next(row for row in found.rows if row.pair.name == "r7").as_dict()
    assert (line["file_a"], line["row_a"], line["row_b"], line["prompt"]) == (0, 7, 6, "r7")
    assert Path(outputs[0], line["video_a"]).is_file() and Path(outputs[1], line["video_b"]).is_file()
    assert all(value is None for name, value in found.rows[8].as_dict().items() if name.endswith("_a"))


def test_the_limit_leaves_later_rows_out_and_says_how_many(outputs: tuple[str, str]) -> None:
    heard: list[tuple[int, int]] = []
    found = compare_runs(*outputs, limit=2, workers=0, listen=lambda done, total: heard.append((done, total)))
    assert [row.pair.name for row in found.rows] == ["r0", "r1"]
    assert found.beyond_limit == 7
    assert heard == [(0, 2), (1, 2), (2, 2)]


def test_two_runs_of_one_output_and_equal_rows(tmp_path: Path) -> None:
    """No row_id: rows find each other by prompt and seed. Equal rows share a video, which is compared and drawn once."""
    _, first = rendered(tmp_path / "a", tmp_path / "out", ["one", "two", "two"], seed=[1, 2, 2])
    _, second = rendered(tmp_path / "b", tmp_path / "out", ["two", "one"], seed=[2, 3])
    out = str(tmp_path / "out")
    heard: list[int] = []
    with pytest.raises(JobError, match=rf"(?s)more than one run; choose with --run-a:.*{first} \(fp32\)"):
        compare_runs(out, out)
    with pytest.raises(JobError, match="no run nope; choose with --run-b"):
        compare_runs(out, out, run_a=first, run_b="nope")
    found = compare_runs(out, out, run_a=first[:6], run_b=second, workers=0)
    assert found.joined_by == "content"
    assert [(row.pair.name, row.reason) for row in found.rows] == [
        ("row 0", "only in A"),
        ("row 1", None),
        ("row 2", "only in A"),
        ("row 1", "only in B"),
    ]
    same = compare_runs(out, out, run_a=first, run_b=first, workers=0, listen=lambda done, total: heard.append(total))
    assert len(same.compared) == 3 and set(heard) == {2}
    assert worst_first(same)[1] == [], "clips that are equal are no worst pairs"


def test_runs_without_a_common_row_are_refused(tmp_path: Path) -> None:
    rendered(tmp_path / "a", tmp_path / "out_a", ["one"])
    rendered(tmp_path / "b", tmp_path / "out_b", ["other"])
    with pytest.raises(JobError, match="no finished row in common"):
        compare_runs(str(tmp_path / "out_a"), str(tmp_path / "out_b"))
    with pytest.raises(JobError, match="has no runs"):
        compare_runs(str(tmp_path / "out_a"), str(tmp_path / "nothing"))


def test_quality_on_the_command_line(
    outputs: tuple[str, str], s3_server: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """B in an object store, the folder too, the clips in a process of their own."""
    out_b, folder = s3_server.uri("quality/out"), s3_server.uri("quality/report")
    source, target = Storage(outputs[1]), Storage(out_b)
    for name in source.list(""):
        target.upload(Path(source.path(name)), name)
    assert main(["quality", outputs[0], out_b, "-o", folder, "--workers", "1", "--json"]) == 1
    printed, told = capsys.readouterr()
    summary = json.loads(printed.splitlines()[-1])
    assert (summary["rows"], summary["compared"], summary["folder"]) == (9, 3, folder)
    assert summary["b"]["output"] == out_b and summary["a"]["precision"] == "fp32"
    assert summary["a"]["crf"] == 18 and "note: encoded with crf 18," in told
    assert summary["metrics"]["lpips"].keys() == {
        *("clips", "median", "mean", "p5", "worst", "worst_row", "worst_frame", "worst_frame_row")
    }
    assert Storage(folder).list("") == sorted(summary["files"])
    assert "PSNR dB ↑" in told and "  r5: unreadable: in B: " in told and "6 not compared" in told
    picture = Image.open(io.BytesIO(Storage(folder).read("worst/01.png")))
    assert picture.size == (800, 332)


def test_a_table_is_printed_and_all_rows_compared_is_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, name = rendered(tmp_path / "a", tmp_path / "out", ["one", "two"])
    monkeypatch.chdir(tmp_path)
    assert main(["quality", "out", "out", "--workers", "0", "--limit", "1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"PSNR dB ↑ +60\.00 +60\.00 +60\.00 +60\.00 row 0", printed)
    assert "1 rows by content: 1 compared, 1 of them identical, 0 not compared, 1 beyond the limit" in printed
    assert (tmp_path / "quality" / f"{name}-{name}" / "plot.png").is_file()


def test_a_process_that_dies_is_not_waited_for() -> None:
    with pytest.raises(RunStopped, match="fewer --workers"):
        list(_in_processes(signal.raise_signal, [signal.SIGKILL], 1))  # type: ignore[arg-type, list-item]
