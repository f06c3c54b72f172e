"""Rows that only the pipeline config knows to be wrong are told with all the others, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ltx_batch.driver import RunOptions, run
from ltx_batch.errors import ManifestError
from ltx_batch.foresight import foresee, validate_job
from ltx_batch.job import JobSpec, parse_job
from ltx_batch.manifest import Manifest, Validation, resolve_rows, validate
from ltx_batch.model.plan import Plan
from ltx_batch.request import RenderRequest
from tests.manifest_files import write_animation


def make_job(folder: Path, rows: list[dict[str, Any]], pipeline_config: str, **defaults: Any) -> JobSpec:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": "a", **row}) + "\n" for row in rows))
    model = {"renderer": "fake", "device": "cpu", "pipeline_config": pipeline_config}
    data = {"manifest": str(folder / "rows.jsonl"), "output": str(folder / "out"), "model": model, "workers": 0}
    return parse_job(
        {**data, "video": {"codec": "fake"}, "defaults": {"height": 64, "width": 64, "num_frames": 9, **defaults}}
    )


def check(job: JobSpec) -> Validation:
    found = validate_job(Manifest.open(job.manifest), job)
    found.warnings = [issue for issue in found.warnings if issue.column != "seed"]
    return found


def errors(job: JobSpec) -> list[tuple[int | None, str | None, str]]:
    return [(issue.row, issue.column, issue.rule) for issue in check(job).errors]


def test_each_row_is_told_with_column_and_rule(tmp_path: Path) -> None:
    write_animation(tmp_path / "video.webp", 9)
    rows: list[dict[str, Any]] = [
        {"seed": 1},
        {"timesteps": [1.0, 0.5]},
        {"num_inference_steps": 12},
        {"height": 32},
        {"seed": 2, "num_inference_steps": 40, "guidance_scale": 3.0, "stg_scale": 1.0},
        {"timesteps": [1.0, 0.25]},
        {"input_media_path": str(tmp_path / "video.webp")},
        {"num_inference_steps": 12, "seed": 3},
    ]
    found = errors(make_job(tmp_path, rows, "ltxv-13b-0.9.8-dev"))
    assert [(row, column) for row, column, _ in found] == [
        (1, "timesteps"),
        (2, "num_inference_steps"),
        (3, "height"),
        (5, "timesteps"),
        (6, "input_media_path"),
        (7, "num_inference_steps"),
    ]
    assert found[0][2].startswith("timesteps of a row cannot serve both passes")
    assert "64x32 is too small for a multi-scale pipeline" in found[2][2]


def test_a_value_of_the_job_is_told_once_and_rows_with_other_faults_are_left_alone(tmp_path: Path) -> None:
    rows = [{"seed": 1}, {"height": 128, "width": 128}, {"height": -4}, {"num_inference_steps": 9}]
    job = make_job(tmp_path, rows, "ltxv-13b-0.9.8-distilled", num_inference_steps=8)
    found = check(job).errors
    assert [(issue.file, issue.row, issue.column, issue.value) for issue in found] == [
        (job.manifest, 2, "height", -4),
        (job.manifest, 3, "num_inference_steps", 9),
        ("the job file", None, "defaults.num_inference_steps", 8),
    ]
    assert found[2].rule.endswith("(2 rows)")
    with pytest.raises(ManifestError, match=r"the job file, defaults\.num_inference_steps = 8"):
        run(job, RunOptions(skip_invalid=True))


def test_a_value_of_the_pipeline_config_is_told_once(tmp_path: Path) -> None:
    config = tmp_path / "late.yaml"
    config.write_text("num_inference_steps: 10\nskip_initial_inference_steps: 5\nstg_scale: 0\n")
    job = make_job(tmp_path, [{"seed": 1}, {"seed": 2}, {"stg_scale": 1}], str(config))
    found = check(job).errors
    assert [(issue.row, issue.column, issue.value) for issue in found] == [
        (2, "stg_scale", 1.0),
        (None, "model.pipeline_config", str(config)),
    ]
    assert "skip_initial_inference_steps needs input_media" in found[1].rule and found[1].rule.endswith("(2 rows)")


def test_where_rows_name_their_input_those_without_are_told_one_by_one(tmp_path: Path) -> None:
    write_animation(tmp_path / "video.webp", 9)
    config = tmp_path / "late.yaml"
    config.write_text("num_inference_steps: 10\nskip_initial_inference_steps: 5\n")
    rows = [{"input_media_path": str(tmp_path / "video.webp")}, {"input_media_path": None}]
    found = errors(make_job(tmp_path, rows, str(config)))
    assert [(row, column) for row, column, _ in found] == [(1, "input_media_path")]


def test_a_rows_schedule_takes_the_place_of_the_jobs_other_one(tmp_path: Path) -> None:
    config = tmp_path / "plain.yaml"
    config.write_text("guidance_scale: 1\n")
    steps = make_job(tmp_path, [{"timesteps": [1.0, 0.5]}, {}], str(config), num_inference_steps=8)
    assert errors(steps) == []
    assert [(one.timesteps, one.num_inference_steps) for one in requests(steps)] == [((1.0, 0.5), None), (None, 8)]
    sigmas = make_job(tmp_path, [{"num_inference_steps": 4}, {}], str(config), timesteps=[1.0, 0.7])
    assert [(one.timesteps, one.num_inference_steps) for one in requests(sigmas)] == [(None, 4), ((1.0, 0.7), None)]
    both = errors(make_job(tmp_path, [{"num_inference_steps": 2, "timesteps": [1.0, 0.5]}], str(config)))
    assert [(row, column) for row, column, _ in both] == [(0, "num_inference_steps")]


def requests(job: JobSpec) -> list[RenderRequest]:
    manifest = Manifest.open(job.manifest)
    (shard,) = manifest.shards(512)
    rows = resolve_rows(manifest.read(shard), manifest=manifest, shard=shard, defaults=job.defaults)
    return [row.request for row in rows if row.request]


def test_timesteps_that_begin_below_1_without_input_media_are_a_warning(tmp_path: Path) -> None:
    config = tmp_path / "plain.yaml"
    config.write_text("guidance_scale: 1\n")
    write_animation(tmp_path / "video.webp", 9)
    late: dict[str, Any] = {"timesteps": [0.9, 0.5]}
    rows = [late, {**late, "input_media_path": str(tmp_path / "video.webp")}, {"timesteps": [1.0, 0.5]}, {"seed": 1}]
    found = check(make_job(tmp_path, rows, str(config)))
    assert found.error_count == 0
    assert [(issue.row, issue.column, issue.value) for issue in found.warnings] == [(0, "timesteps", [0.9, 0.5])]
    config.write_text("guidance_scale: 1\ntimesteps: [0.9, 0.5]\n")
    (warning,) = check(make_job(tmp_path, [{"seed": 1}, {"seed": 2}], str(config))).warnings
    assert (warning.column, warning.value) == ("model.pipeline_config", str(config))
    assert "the first timestep is 0.9" in warning.rule and warning.rule.endswith("(2 rows)")


def test_spatio_temporal_guidance_needs_blocks_to_perturb(tmp_path: Path) -> None:
    config = tmp_path / "plain.yaml"
    config.write_text("timesteps: [1.0, 0.5]\nguidance_scale: 1\n")
    found = errors(make_job(tmp_path, [{"stg_scale": 1.0}, {"stg_scale": 0.0}], str(config)))
    assert [(row, column) for row, column, _ in found] == [(0, "stg_scale")]


def test_a_run_refuses_them_and_starts_nothing(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"seed": 1}, {"timesteps": [1.0]}], "ltxv-13b-0.9.8-dev")
    with pytest.raises(ManifestError, match="timesteps of a row cannot serve both passes"):
        run(job)
    assert not (tmp_path / "out" / "videos").exists()


def test_combinations_are_planned_once(tmp_path: Path) -> None:
    planned: list[RenderRequest] = []
    rows = [{"seed": n, "height": 64 + 32 * (n % 3), "guidance_scale": 1.5 + n / 100} for n in range(300)]
    job = make_job(tmp_path, rows, "ltxv-2b-0.9.5")
    plan = foresee(job.model).planner

    def planner(request: RenderRequest) -> Plan:
        planned.append(request)
        return plan(request)

    found = validate(Manifest.open(job.manifest), job, tokenizer=None, planner=planner)
    assert (found.error_count, len(planned)) == (0, 3)
    assert sorted(request.height for request in planned) == [64, 96, 128]
