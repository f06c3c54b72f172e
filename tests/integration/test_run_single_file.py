"""A job from official files alone: every place that asks for the model knows where its parts come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.driver import run
from ltx_batch.errors import CheckpointError
from ltx_batch.plan import make_plan
from tests.integration.job_runs import check_output, make_job, write_manifest
from tests.official_file import ALLOWED, PLAIN, write_official_file, write_official_upsampler
from tests.tiny_checkpoint import write_tiny_checkpoint

PASSES = """
pipeline_type: multi-scale
first_pass: {timesteps: [1.0, 0.725], guidance_scale: 1, stg_scale: 0, rescaling_scale: 1}
second_pass: {timesteps: [0.725, 0.4219], guidance_scale: 1, stg_scale: 0, rescaling_scale: 1}
"""
SIZE = {"height": 96, "width": 96, "num_frames": 9, "frame_rate": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def named(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline config that names official files of a distilled model for everything."""
    place = tmp_path_factory.mktemp("official")
    file = write_official_file(folder, place / "ltx.safetensors", PLAIN, changes={"allowed_inference_steps": ALLOWED})
    upsampler = write_official_upsampler(folder, place / "up.safetensors")
    (place / "config.yaml").write_text(
        f"{PASSES}checkpoint_path: {file}\nspatial_upscaler_model_path: {upsampler}\n"
        f"text_encoder_model_name_or_path: {folder}\n"
    )
    return place / "config.yaml"


def job_of(tmp_path: Path, **model: Any) -> Any:
    manifest = write_manifest(tmp_path, ["a red circle"])
    model = {"renderer": "ltx", "device": "cpu", **model}
    return make_job(manifest, tmp_path / "out", model=model, defaults=SIZE, video={"crf": 0})


@pytest.mark.parametrize("text", ["inline", "stage"])
def test_a_pipeline_config_alone_is_a_job(folder: Path, named: Path, tmp_path: Path, text: str) -> None:
    job = job_of(tmp_path, pipeline_config=str(named)).model_copy(update={"text": text})
    summary = run(job)
    assert (summary.exit_code, summary.ok) == (0, 1)
    (record,) = check_output(job, summary.run).records.values()
    request = RenderRequest(prompt="a red circle", seed=0, **SIZE)
    clip = load_renderer(str(folder), pipeline_config=str(named), device="cpu").render([request])[0]
    assert record.frames_sha256 == clip.frames_sha256()
    assert make_plan(job).as_dict()["rows"]["done"] == 1


def test_names_in_the_job_stand_before_the_configs(folder: Path, named: Path, tmp_path: Path) -> None:
    other = write_tiny_checkpoint(tmp_path / "other", seed=4)
    first = run(job_of(tmp_path, pipeline_config=str(named)))
    places = {
        "text_encoder": str(other),
        "upsampler": str(write_official_upsampler(other, tmp_path / "up.safetensors")),
    }
    for name, place in places.items():
        second = run(job_of(tmp_path, pipeline_config=str(named), **{name: place}))
        assert (second.ok, second.rendered, second.reused) == (1, 1, 0), name  # another picture, under another key
        assert second.run != first.run
    again = run(job_of(tmp_path / "again", pipeline_config=str(named), text_encoder=str(folder)))
    assert again.run == first.run  # the same bytes under another name


def test_a_file_without_its_upscaler_is_refused_before_anything_runs(folder: Path, named: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.yaml"
    bare.write_text(PASSES)
    job = job_of(tmp_path, checkpoint=str(named.with_name("ltx.safetensors")), pipeline_config=str(bare))
    with pytest.raises(CheckpointError, match=r"set model\.text_encoder"):
        run(job)
