"""Whole runs in one process: real worker, ledger, storage and ffmpeg; only the pixels are scripted."""

from __future__ import annotations

import datetime
import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from job_runs import Driver, check_output, ledger_of, make_job, read_records, run_apart, write_manifest

from ltx_batch.driver import RunOptions, run
from ltx_batch.errors import JobError, ManifestError
from ltx_batch.manifest import seed_of
from ltx_batch.media import read_media
from ltx_batch.tally import Summary


def test_every_row_becomes_a_video_a_record_and_a_line(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, [f"clip {i}" for i in range(10)]), tmp_path / "out")
    summary = run(job)
    assert (summary.exit_code, summary.ok, summary.rendered, summary.shards_done) == (0, 10, 10, 3)
    output = check_output(job, summary.run)
    assert len(output.records) == 10
    for line in output.lines:
        frames = read_media(tmp_path / "out" / line["ltx_video"])
        assert frames.shape == (3, 32, 32, 3) and frames.std() > 10
    record = next(iter(output.records.values()))
    assert record.attempt_id and record.versions and {"render", "encode", "fetch"} <= record.timings.keys()


def test_the_seed_that_was_used_is_told(tmp_path: Path) -> None:
    """Also where it was made of the row's id, and of rows that failed: whoever renders one by hand needs it."""
    manifest = tmp_path / "ids.parquet"
    names = ["a", "b", "c"]
    columns = {"prompt": ["one", "two [raise MediaError]", "three"], "row_id": names, "seed": [None, None, 5]}
    pq.write_table(pa.table(columns), manifest)
    job = make_job(str(manifest), tmp_path / "out")
    output = check_output(job, run(job).run)
    seeds = [seed_of("a"), seed_of("b"), 5]
    assert [line["ltx_seed"] for line in output.lines] == seeds
    assert {output.records[line["ltx_key"]].seed for line in output.lines if line["ltx_status"] == "ok"} == {
        seeds[0],
        5,
    }
    other = make_job(write_manifest(tmp_path, ["one"], seed=[seeds[0]]), tmp_path / "out")
    (again,) = check_output(other, run(other).run).lines
    assert again["ltx_reused"] and again["ltx_seed"] == seeds[0], "the seed by hand is the same clip"


def test_the_file_on_disk_shows_the_frames_that_were_rendered(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, ["bars"]), tmp_path / "out", video={"crf": 0})
    (line,) = check_output(job, run(job).run).lines
    frames = read_media(tmp_path / "out" / line["ltx_video"]).astype(int)
    assert np.median(np.abs(frames[0, 0, :4] - [255, 255, 255])) <= 2, "the first of the bars is white"


def test_equal_rows_are_rendered_once_and_have_a_line_each(tmp_path: Path) -> None:
    prompts = ["twin", "other", "twin", "more", "twin", "last"]  # the third twin is in the next shard
    job = make_job(write_manifest(tmp_path, prompts, seed=[1] * 6), tmp_path / "out")
    summary = run(job)
    output = check_output(job, summary.run)
    assert (summary.rendered, summary.reused, len(output.records)) == (4, 2, 4)
    twins = [line for line in output.lines if line["prompt"] == "twin"]
    assert [line["ltx_reused"] for line in twins] == [False, True, True]
    assert len({line["ltx_video"] for line in twins}) == 1


def test_other_columns_are_carried_untouched(tmp_path: Path) -> None:
    extra = {
        "tags": [["a", "b"], None, [], ["c"], ["d"]],
        "made": [datetime.datetime(2026, 1, i + 1) for i in range(5)],
        "score": [0.1, None, float("inf"), -1.0, 2.0],
        "nested": [{"x": i, "y": str(i)} for i in range(5)],
    }
    job = make_job(write_manifest(tmp_path, [f"p{i}" for i in range(5)], **extra), tmp_path / "out")
    output = check_output(job, run(job).run)
    for name, values in extra.items():
        assert [line[name] for line in output.lines] == values


def test_another_recipe_renders_anew_and_leaves_the_old_alone(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, ["a", "b", "c"])
    first, second = (make_job(manifest, tmp_path / "out", video={"crf": crf}) for crf in (18, 40))
    before = check_output(first, run(first).run)
    bytes_before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    summary = run(second)
    assert (summary.rendered, summary.reused) == (3, 0)
    assert all(path.read_bytes() == data for path, data in bytes_before.items())
    after = check_output(second, summary.run)
    assert not before.records.keys() & {line["ltx_key"] for line in after.lines} and len(after.records) == 6


def test_a_new_manifest_over_old_videos_renders_only_what_is_new(tmp_path: Path) -> None:
    prompts, seeds = [f"p{i}" for i in range(8)], list(range(8))
    first = make_job(write_manifest(tmp_path / "1", prompts, seed=seeds), tmp_path / "out")
    run(first)
    changed = ["new", *prompts[1:], "p0", "new too"]  # rows in the place they had, one that moved, and new ones
    second = make_job(write_manifest(tmp_path / "2", changed, seed=[0, *seeds[1:], 0, 9]), tmp_path / "out")
    summary = run(second)
    assert (summary.rendered, summary.reused) == (2, 8)
    output = check_output(second, summary.run)
    assert [line["ltx_reused"] for line in output.lines] == [False] + [True] * 8 + [False]


def test_auto_precision_is_resolved_once_and_frozen_in_the_run(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, ["a", "b"]), tmp_path / "out")
    described = ledger_of(job).read_run(run(job).run)
    assert described is not None
    assert (described["recipe"]["precision"], described["precision"]) == ("auto", "fp32")
    assert described["precision_reason"] == "on a CPU nothing is faster"
    explicit = make_job(job.manifest, tmp_path / "out", model={"precision": "fp32"})
    assert run(explicit).rendered == 0, "keys hold the resolved name"


def test_a_later_driver_takes_the_precision_that_the_first_one_froze(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, ["a", "b"]), tmp_path / "out")
    name = run(make_job(job.manifest, tmp_path / "elsewhere")).run
    ledger_of(job).open_run(name, {"precision": "bf16"})  # as a driver on a GPU would
    assert run(job).run == name
    assert {record.ran["precision"] for record in read_records(job).values()} == {"bf16"}


def test_a_window_of_the_manifest_is_held_not_all_of_it(tmp_path: Path) -> None:
    """Priorities rise with the row, so that what is rendered tells how far the driver has read."""
    rows = 2400
    manifest = write_manifest(tmp_path, ["p"] * rows, priority=list(range(rows)))
    job = make_job(manifest, tmp_path / "out", shard_rows=100, video={"codec": "fake"})

    def stop_soon(summary: Summary) -> None:
        if summary.rendered >= 20 and not summary.draining:
            os.kill(os.getpid(), signal.SIGTERM)

    summary = run(job, listen=stop_soon)
    assert summary.exit_code == 3 and 20 <= summary.rendered < rows
    finished = sorted(read_records(job).values(), key=lambda record: record.finished_at or "")
    lines = {record.key: number for number, record in enumerate(finished)}
    assert len(lines) == summary.rendered
    rest = run(job)
    assert rest.exit_code == 0 and rest.reused == summary.rendered
    row_of = {line["ltx_key"]: line["ltx_row"] for line in check_output(job, rest.run).lines}
    ahead = [row_of[record.key] - place for place, record in enumerate(finished)]
    assert max(ahead) < 2000 + 2 * 100, "a window of tasks and the shard that overfilled it"


def test_two_drivers_on_one_run_agree(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, [f"p{i} [sleep 0.05]" for i in range(16)]), tmp_path / "out")
    with Driver(job) as one, Driver(job) as two:
        results = [one.result(), two.result()]
    assert [(code, summary["ok"]) for code, summary in results] == [(0, 16), (0, 16)]
    output = check_output(job, results[0][1]["run"])
    assert len(output.records) == 16
    assert sum(summary["rendered"] for _, summary in results) >= 16
    assert len(list((tmp_path / "out" / "videos").rglob("*.mp4"))) == 16


def test_bad_rows_refuse_the_run_and_nothing_is_written(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path, ["good", "", "good too", "bad"], height=[32, 32, 33, 0])
    job = make_job(manifest, tmp_path / "out")
    with pytest.raises(ManifestError) as caught:
        run(job)
    assert {(issue.row, issue.column) for issue in caught.value.issues} == {(1, "prompt"), (2, "height"), (3, "height")}
    assert not (tmp_path / "out").exists()


def test_skip_invalid_records_bad_rows_and_renders_the_others(tmp_path: Path) -> None:
    manifest = write_manifest(
        tmp_path,
        ["good", "", "missing", "also good", "twice"],
        row_id=["a", "b", "c", "d", "a"],
        conditioning_media_paths=[None, None, ["nowhere.png"], None, None],
        conditioning_start_frames=[None, None, [0], None, None],
    )
    job = make_job(manifest, tmp_path / "out")
    summary = run(job, RunOptions(skip_invalid=True))
    assert (summary.exit_code, summary.ok, summary.failed) == (1, 2, 3)
    output = check_output(job, summary.run)
    assert [line["ltx_error_class"] for line in output.lines] == [None, "InvalidRow", "InvalidRow", None, "InvalidRow"]
    assert "row_id" in output.lines[4]["ltx_error"] and "nowhere.png" in output.lines[2]["ltx_error"]
    assert [line["ltx_attempts"] for line in output.lines] == [1, 0, 0, 1, 0]


def test_rows_that_were_skipped_never_stop_a_run(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, [""] * 6 + ["good"]), tmp_path / "out", shard_rows=7, stop_after_failures=5)
    summary = run(job, RunOptions(skip_invalid=True))
    assert (summary.exit_code, summary.ok, summary.failed) == (1, 1, 6)


@pytest.mark.parametrize("name", ["manifest", "output"])
def test_relative_paths_are_refused_inside_a_ray_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    job = make_job(write_manifest(tmp_path, ["a"]), tmp_path / "out").model_copy(update={name: "some/where"})
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(JobError, match=f"{name}: some/where is relative.*--{name}"):
        run(job)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.parquet"]


def test_a_batch_is_rendered_together_and_committed_row_by_row(tmp_path: Path) -> None:
    """A shape's three rows sleep in one call, and each is charged a third of it."""
    prompts = [f"p{i} [sleep 0.2]" if i == 0 else f"p{i}" for i in range(6)]
    job = make_job(write_manifest(tmp_path, prompts, height=[32, 64] * 3), tmp_path / "out", batch_size=3, shard_rows=6)
    output = check_output(job, run(job).run)
    shared = {line["ltx_render_seconds"] for line in output.lines if output.records[line["ltx_key"]].height == 32}
    assert len(shared) == 1 and shared.pop() >= 0.2 / 3
    assert len(output.records) == 6


def test_a_process_of_its_own_ends_with_the_runs_exit_code(tmp_path: Path) -> None:
    code, told = run_apart(make_job(write_manifest(tmp_path, ["a", "b [raise MediaError]"]), tmp_path / "out"))
    assert code == 1 and told["top_errors"] == [["MediaError: scripted fault: MediaError", 1]]
    assert not told["ray_loaded"]


def test_the_heartbeat_and_run_description_can_be_read_by_anyone(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, ["a", "b"]), tmp_path / "out", gpu_hour_price=2.5)
    summary = run(job)
    status = json.loads((tmp_path / "out" / "runs" / summary.run / "status.json").read_text())
    assert {name: status[name] for name in ("rows", "ok", "failed", "rendered", "cost")} == {
        "rows": 2, "ok": 2, "failed": 0, "rendered": 2, "cost": 0.0,
    }  # fmt: skip
    described = json.loads((tmp_path / "out" / "runs" / summary.run / "run.json").read_text())
    assert described["job"]["manifest"] == job.manifest and described["manifest"][0]["rows"] == 2


def test_shards_follow_the_row_groups_of_several_files(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    for part in range(2):
        table = pq.read_table(write_manifest(tmp_path / str(part), [f"{part}-{i}" for i in range(5)]))
        folder.mkdir(exist_ok=True)
        pq.write_table(table, folder / f"{part}.parquet", row_group_size=3)
    job = make_job(str(folder), tmp_path / "out", shard_rows=2)
    summary = run(job)
    assert (summary.ok, summary.shards_done) == (10, 6)
    check_output(job, summary.run)
