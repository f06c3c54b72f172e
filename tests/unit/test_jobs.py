"""The job files that ship load, and say what the documentation says of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from ltx_batch.errors import JobError
from ltx_batch.job import JobSpec, load_job

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.yaml"))
IN_PROCESS = ("smoke",)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _written(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in data.items():
        if isinstance(value, dict) and value:
            yield from _written(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_file_loads(path: Path) -> None:
    job = load_job(path)
    assert job.model.checkpoint
    assert (job.workers == 0) == (path.stem in IN_PROCESS), "every job but the smoke test goes through Ray"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_typo_in_a_job_file_is_named(path: Path) -> None:
    text = path.read_text().replace("checkpoint:", "chekpoint:")
    with pytest.raises(JobError, match=r"model\.chekpoint: unknown key; did you mean model\.checkpoint\?"):
        load_job(path, text=text)


@pytest.mark.parametrize("name", ["demo", "smoke"])
def test_local_jobs_stay_in_the_checkout(name: str) -> None:
    job = load_job(ROOT / "jobs" / f"{name}.yaml")
    assert job.output == f"out/{name}", "out/ is what git and Ray leave out"
    assert job.model.checkpoint == "demo"


def test_demo_sets_no_schedule_of_its_own() -> None:
    defaults = load_job(ROOT / "jobs" / "demo.yaml").defaults
    schedule = (defaults.timesteps, defaults.num_inference_steps, defaults.guidance_scale, defaults.decode_timestep)
    assert schedule == (None, None, None, None)


def test_smoke_manifest_is_a_few_small_rows() -> None:
    job = load_job(ROOT / "jobs" / "smoke.yaml")
    rows = [json.loads(line) for line in (ROOT / job.manifest).read_text().splitlines()]
    assert 1 <= len(rows) <= 4
    for row in rows:
        assert row["prompt"]
        assert row["height"] % 32 == row["width"] % 32 == 0
        assert row["num_frames"] % 8 == 1


def test_nightly_shows_every_key() -> None:
    data = yaml.safe_load((ROOT / "jobs" / "nightly.yaml").read_text())
    assert set(_written(data)) == set(_keys(JobSpec))


def test_nightly_agrees_with_the_defaults_it_quotes() -> None:
    """Lines that a comment calls the default hold the default."""
    job = load_job(ROOT / "jobs" / "nightly.yaml")
    plain = JobSpec(manifest=job.manifest, output=job.output)
    assert job.defaults == plain.defaults
    assert job.video == plain.video
    assert job.attempts == plain.attempts
    assert (job.batch_size, job.shard_rows, job.stop_after_failures) == (
        plain.batch_size,
        plain.shard_rows,
        plain.stop_after_failures,
    )


def test_nightly_suits_a_scheduler_on_a_cluster() -> None:
    job = load_job(ROOT / "jobs" / "nightly.yaml")
    assert job.manifest.startswith("s3://"), "relative paths are refused inside a Ray job"
    assert job.output.startswith("s3://"), "relative paths are refused inside a Ray job"
    assert isinstance(job.workers, int), "a cluster that scales from zero has no GPU to count yet"
    assert job.worker.num_gpus == 1
    assert job.on_failed_rows == "exit0", "a scheduler would start the job again for rows that cannot succeed"
    assert job.gpu_hour_price is not None
    assert job.max_failed_fraction is not None


def test_overrides_reach_nested_keys_of_a_shipped_job() -> None:
    job = load_job(ROOT / "jobs" / "nightly.yaml", overrides=["model.precision=bf16", "workers=auto", "video.crf=23"])
    assert (job.model.precision, job.workers, job.video.crf) == ("bf16", "auto", 23)
