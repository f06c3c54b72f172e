"""Rows that only the pipeline config knows to be wrong are told with all the others, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ltx_batch.driver import run
from ltx_batch.errors import ManifestError
from ltx_batch.job import JobSpec, parse_job
from ltx_batch.manifest import Manifest, validate
from ltx_batch.renderer import job_planner


def make_job(folder: Path, rows: list[dict[str, Any]], pipeline_config: str, **defaults: Any) -> JobSpec:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": "a", **row}) + "\n" for row in rows))
    model = {"renderer": "fake", "device": "cpu", "pipeline_config": pipeline_config}
    data = {"manifest": str(folder / "rows.jsonl"), "output": str(folder / "out"), "model": model, "workers": 0}
    return parse_job({**data, "video": {"codec": "fake"}, "defaults": {"height": 64, "width": 64, **defaults}})


def errors(job: JobSpec) -> list[tuple[int | None, str | None, str]]:
    found = validate(Manifest.open(job.manifest), job, tokenizer=None, planner=job_planner(job.model))
    return [(issue.row, issue.column, issue.rule) for issue in found.errors]


def test_each_row_is_told_with_column_and_rule(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(b"x")
    rows: list[dict[str, Any]] = [
        {"seed": 1},
        {"timesteps": [1.0, 0.5]},
        {"num_inference_steps": 12},
        {"height": 32},
        {"seed": 2, "num_inference_steps": 40, "guidance_scale": 3.0, "stg_scale": 1.0},
        {"timesteps": [1.0, 0.25]},
        {"input_media_path": str(tmp_path / "video.mp4")},
        {"num_inference_steps": 12, "seed": 3},
    ]
    found = errors(make_job(tmp_path, rows, "ltxv-13b-0.9.8-dev"))
    assert [(row, column) for row, column, _ in found] == [
        (1, "timesteps"),
        (2, "num_inference_steps"),
        (3, None),
        (5, "timesteps"),
        (6, "input_media_path"),
        (7, "num_inference_steps"),
    ]
    assert found[0][2].startswith("timesteps of a row cannot serve both passes")
    assert "32x64 is too small for a multi-scale pipeline" in found[2][2]


def test_the_jobs_defaults_count_and_rows_with_other_faults_are_left_alone(tmp_path: Path) -> None:
    rows = [{"seed": 1}, {"height": 128, "width": 128}, {"height": -4}]
    found = errors(make_job(tmp_path, rows, "ltxv-13b-0.9.8-distilled", num_inference_steps=8))
    assert [(row, column) for row, column, _ in found] == [
        (0, "num_inference_steps"),
        (1, "num_inference_steps"),
        (2, "height"),
    ]


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
    planned = []
    job = make_job(tmp_path, [{"seed": n, "height": 64 + 32 * (n % 3)} for n in range(300)], "ltxv-2b-0.9.5")
    found = validate(Manifest.open(job.manifest), job, tokenizer=None, planner=planned.append)
    assert (found.error_count, len(planned)) == (0, 3)
