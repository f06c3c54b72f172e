"""`plan`: rows by state and size, and estimates from what an output has measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ltx_batch.cli import main
from ltx_batch.driver import run
from ltx_batch.job import JobSpec, parse_job
from ltx_batch.model.plan import plan_request
from ltx_batch.plan import make_plan
from ltx_batch.request import RenderRequest


def make_job(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> JobSpec:
    path = folder / f"rows-{len(list(folder.glob('rows-*')))}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data: dict[str, Any] = {
        "manifest": str(path),
        "output": str(folder / "out"),
        "model": {"renderer": "fake", "device": "cpu"},
        "workers": 0,
        "shard_rows": 2,
        "defaults": {"height": 32, "width": 64, "num_frames": 9, "num_inference_steps": 4},
        "attempts": {"max_attempts": 1},
        "video": {"codec": "fake"},
    }
    return parse_job({**data, **changes})


def test_shapes_and_passes(tmp_path: Path) -> None:
    rows = [
        {"prompt": "one"},
        {"prompt": "two", "seed": 3},
        {"prompt": "large", "height": 70, "width": 96, "num_frames": 20},
        {"prompt": "stepped", "timesteps": [1.0, 0.5]},
    ]
    data = make_plan(make_job(tmp_path, rows)).as_dict()
    assert data["rows"] == {"new": 4, "done": 0, "failed": 0, "invalid": 0}
    assert [(shape["height"], shape["width"], shape["num_frames"], shape["rows"]) for shape in data["shapes"]] == [
        (70, 96, 20, 1),
        (32, 64, 9, 2),
        (32, 64, 9, 1),
    ]
    # 70 is padded to 96, 20 frames to 25: 4 latent frames of 3 x 3.
    made = {"calls": 4, "row_forwards": 8, "timesteps": (1.0, 0.9875, 0.975, 0.725)}
    assert data["shapes"][0]["passes"] == ({"height": 96, "width": 96, "tokens": 36, **made},)
    assert data["shapes"][1]["passes"] == ({"height": 32, "width": 64, "tokens": 4, **made},)
    assert data["shapes"][2]["passes"][0]["timesteps"] == (1.0, 0.5)
    assert data["estimate"]["gpu_hours"] is None
    assert "96x70, 20 frames" in data["estimate"]["note"]
    assert not (tmp_path / "out").exists(), "planning writes nothing"


def test_rows_by_state_before_and_after_a_run(tmp_path: Path) -> None:
    rows = [{"prompt": "one"}, {"prompt": "two"}, {"prompt": "broken [raise]"}, {"prompt": ""}]
    job = make_job(tmp_path, rows)
    assert make_plan(job).as_dict()["rows"] == {"new": 3, "done": 0, "failed": 0, "invalid": 1}
    run(make_job(tmp_path, rows[:3]))
    after = make_plan(job)
    assert (after.new, after.done) == (1, 2), "another manifest finds the clips of the first by key"
    done = make_plan(make_job(tmp_path, rows[:3]))
    assert (done.new, done.done, done.failed) == (0, 2, 1)
    assert done.estimate.storage_bytes == 0


def test_estimate_goes_by_measured_rows_of_the_same_size(tmp_path: Path) -> None:
    run(make_job(tmp_path, [{"prompt": "one [sleep 0.2]"}, {"prompt": "two [sleep 0.4]"}]))
    plan = make_plan(make_job(tmp_path, [{"prompt": f"new {row}"} for row in range(36)], gpu_hour_price=2.0))
    assert plan.new == 36
    estimate = plan.estimate
    assert estimate.measured_rows == 2
    assert estimate.worker_hours == pytest.approx(36 * 0.3 / 3600, rel=0.3), "the mean of both rows"
    assert (estimate.gpu_hours, estimate.cost) == (0.0, 0.0), "no GPU was held"
    assert estimate.storage_bytes == 36 * 64, "the fake codec writes 64 bytes"


def test_another_recipe_measures_nothing_for_this_one(tmp_path: Path) -> None:
    rows = [{"prompt": "one"}]
    run(make_job(tmp_path, rows))
    other = make_plan(make_job(tmp_path, rows, video={"codec": "fake", "crf": 20}))
    assert (other.new, other.done) == (1, 0)
    assert other.estimate.worker_hours is None


def test_without_the_checkpoint_done_is_unknown(tmp_path: Path) -> None:
    job = make_job(tmp_path, [{"prompt": "one"}], model={"checkpoint": str(tmp_path / "absent")})
    data = make_plan(job).as_dict()
    assert data["rows"] == {"new": 1, "done": None, "failed": None, "invalid": 0}
    assert data["shapes"][0]["new"] is None
    assert "checkpoint" in data["note"]
    assert data["estimate"]["gpu_hours"] is None


def test_auto_precision_is_known_once_a_run_resolved_it(tmp_path: Path) -> None:
    rows, auto = [{"prompt": "one"}], {"renderer": "fake"}
    job = make_job(tmp_path, rows, model=auto)
    assert make_plan(job).done == 0, "nothing is done in an empty output, whatever the precision"
    run(make_job(tmp_path, rows, model={"renderer": "fake", "device": "cpu", "precision": "bf16"}))
    unknown = make_plan(job)
    assert unknown.done is None
    assert "precision" in str(unknown.note)
    run(make_job(tmp_path, rows))
    assert make_plan(job).done == 1, "where a row is rendered is not in its run's name"
    assert make_plan(make_job(tmp_path, [*rows, {"prompt": "two"}], model=auto)).done == 1


def test_rows_that_cannot_be_rendered_are_not_new(tmp_path: Path) -> None:
    model = {"renderer": "fake", "device": "cpu", "pipeline_config": "ltxv-13b-0.9.8-dev"}
    (tmp_path / "there.png").write_bytes(b"picture")
    rows: list[dict[str, Any]] = [
        {"prompt": "one"},
        {"prompt": "no schedule for two passes", "timesteps": [1.0, 0.5]},
        {"prompt": "missing", "conditioning_media_paths": ["gone.png"], "conditioning_start_frames": [0]},
        {"prompt": "there", "conditioning_media_paths": ["there.png"], "conditioning_start_frames": [0]},
        {"prompt": "small", "width": 32},
        {"prompt": ""},
    ]
    sizes = {"height": 256, "width": 256, "num_frames": 9}
    fresh = make_plan(make_job(tmp_path, rows, model=model, defaults=sizes))
    assert (fresh.new, fresh.done, fresh.failed, fresh.invalid) == (2, 0, 0, 4)
    run(make_job(tmp_path, rows[:1], model=model, defaults=sizes))
    later = make_plan(make_job(tmp_path, rows, model=model, defaults=sizes))
    assert (later.new, later.done, later.failed, later.invalid) == (1, 1, 0, 4)


def test_rows_are_planned_once_for_each_of_their_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[RenderRequest] = []
    plan_of = plan_request
    monkeypatch.setattr(
        "ltx_batch.foresight.plan_request", lambda one, **how: planned.append(one) or plan_of(one, **how)
    )
    rows = [{"prompt": f"{n}", "height": 64 + 32 * (n % 3), "guidance_scale": 1 + n / 10} for n in range(90)]
    found = make_plan(make_job(tmp_path, rows))
    assert found.new == 90 and len(planned) == 4, "three heights, and of one of them a row without guidance"
    assert sorted(shape.rows for shape in found.shapes) == [1, 29, 30, 30]


def test_sizes_beyond_a_limit_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltx_batch.plan.MAX_SHAPES", 2)
    rows = [{"prompt": f"{n}", "height": 32 * (1 + n % 4)} for n in range(8)]
    found = make_plan(make_job(tmp_path, rows))
    assert (found.new, len(found.shapes), found.other_rows) == (8, 2, 4)
    assert [(shape.rows, shape.new) for shape in found.shapes] == [(2, 2), (2, 2)]
    run(make_job(tmp_path, rows[3:4]))
    later = make_plan(make_job(tmp_path, rows))
    assert (later.new, later.done, later.other_rows) == (7, 1, 4)


def test_table_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = make_job(tmp_path, [{"prompt": "one"}, {"prompt": ""}])
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    assert main(["plan", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "rows: 1 new, 0 done, 0 failed" in printed
    assert "64x32" in printed
    assert "4 x 4" in printed
    assert "1 rows break rules; `ltx-batch validate` names them" in printed


def test_a_presets_passes_are_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "one"}, {"prompt": "two", "height": 512, "width": 768}]
    model = {"renderer": "fake", "device": "cpu", "pipeline_config": "ltxv-13b-0.9.8-distilled"}
    job = make_job(tmp_path, rows, model=model, defaults={"height": 704, "width": 1216, "num_frames": 121})
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json", exclude_defaults=True)))
    first, second = make_plan(job).as_dict()["shapes"][0]["passes"]
    assert first["timesteps"] == (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725)
    assert (second["height"], second["width"], second["tokens"], second["calls"]) == (896, 1600, 22_400, 3)
    assert main(["plan", str(file)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "pass 2: 3 calls, 3 rows forward, timesteps 0.9094, 0.725, 0.4219" in said
