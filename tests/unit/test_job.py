"""The job file: its faults all at once, each with the way out."""

from __future__ import annotations

import pytest

from ltx_batch.errors import JobError
from ltx_batch.job import load_job, parse_job

MINIMAL = "manifest: m.parquet\noutput: out\n"


def test_defaults_and_overrides() -> None:
    job = load_job(
        "x", text=MINIMAL, overrides=["model.precision=bf16", "video.crf=20", "workers=2", "output=s3://b/p"]
    )
    assert (job.model.precision, job.video.crf, job.workers, job.output) == ("bf16", 20, 2, "s3://b/p")
    assert job.batch_size == 1 and job.shard_rows == 512 and job.defaults.seed == 171198


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        ("manifets: a\noutput: b", ["manifest: missing", "manifets: unknown key; did you mean manifest?"]),
        (MINIMAL + "model: {precison: bf16}", ["model.precison: unknown key; did you mean model.precision?"]),
        (MINIMAL + "crf: 20", ["crf: unknown key; did you mean video.crf?"]),
        (MINIMAL + "batch_size: 0", ["batch_size", "found 0"]),
        (MINIMAL + "model: {precision: int7}", ["model.precision", "int8"]),
        (MINIMAL + "zzz: 1", ["zzz: unknown key; jobs/nightly.yaml has every key"]),
        ("manifest: a", ["output: missing; output prefix: a local folder or any fsspec URI"]),
        (MINIMAL + "workers: many", ["1 fault(s)", "workers: must be auto, or a whole number", "(found 'many')"]),
        (MINIMAL + "workers: -1", ["1 fault(s)", "workers: must be auto"]),
        (MINIMAL + "defaults: {timesteps: 1}", ["defaults.timesteps: Input should be a list (found 1)"]),
        (MINIMAL + "model: {loras: ['x:loud']}", ["model.loras.0: 'loud' is no weight"]),
        (
            MINIMAL + "model: {loras: [{path: a, weigth: 2}]}",
            ["model.loras.0.weigth: unknown key; did you mean model.loras.weight?"],
        ),
    ],
)
def test_faults_name_the_key_and_the_way_out(text: str, hints: list[str]) -> None:
    with pytest.raises(JobError) as error:
        load_job("job.yaml", text=text)
    for hint in hints:
        assert hint in str(error.value)


@pytest.mark.parametrize("key", ["zzz: 1", "model: {loras: [{path: a, strength: 2}]}", "model: {lines: 3}"])
def test_nothing_is_suggested_where_nothing_is_near(key: str) -> None:
    with pytest.raises(JobError) as error:
        load_job("job.yaml", text=MINIMAL + key)
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (MINIMAL + "workers: 1\noutput: b\n", "line 4: output is there already, in line 2"),
        (MINIMAL + "model:\n  precision: fp32\nworkers: 1\nmodel:\n  device: cpu\n", "line 6: model is there already"),
        (MINIMAL + "video: {crf: 20, crf: 21}\n", "line 3: video.crf is there already, in line 3"),
        (MINIMAL + "model:\n  loras:\n    - path: a\n      path: b\n", "line 6: model.loras.0.path is there already"),
    ],
)
def test_a_key_that_is_there_twice_is_told_with_its_lines(text: str, told: str) -> None:
    with pytest.raises(JobError) as error:
        load_job("job.yaml", text=text)
    assert told in str(error.value)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(JobError, match=r"3 fault\(s\)"):
        parse_job({"output": "o", "batch_size": -1, "wrokers": 2})


@pytest.mark.parametrize("override", ["model.precision", "=x", "manifest.a=1", "video.crf={"])
def test_a_bad_override_is_named(override: str) -> None:
    with pytest.raises(JobError, match="--set"):
        load_job("x", text=MINIMAL, overrides=[override])


def test_a_missing_file_points_to_one_that_works() -> None:
    with pytest.raises(JobError, match=r"jobs/demo\.yaml"):
        load_job("nowhere.yaml")


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [", ""])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(JobError):
        load_job("x", text=text)
