"""What `validate` and `plan` know of a job's model, and what they say they cannot know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from job_runs import make_job, write_manifest

from ltx_batch.cli import main
from ltx_batch.driver import RunOptions, run
from ltx_batch.errors import LtxBatchError, ManifestError
from ltx_batch.foresight import foresee, validate_job
from ltx_batch.job import JobSpec, ModelSpec
from ltx_batch.manifest import Manifest, Validation
from ltx_batch.plan import make_plan
from tests.lora_files import random_pairs, write_lora
from tests.tiny_checkpoint import write_tiny_checkpoint

PLAIN = "timesteps: [1.0, 0.5]\nguidance_scale: 1\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), pipeline_config=PLAIN)


def job_of(folder: Path, changes: Mapping[str, Any] = MappingProxyType({}), **model: Any) -> JobSpec:
    manifest = write_manifest(folder, ["a red circle", "a blue square"])
    return make_job(
        manifest, folder / "out", model={"renderer": "ltx", "device": "cpu", "precision": "fp32", **model}, **changes
    )


def check(job: JobSpec) -> Validation:
    return validate_job(Manifest.open(job.manifest), job)


def told(issues: Any) -> list[tuple[str | None, Any]]:
    assert all(issue.file == "the job file" and issue.row is None for issue in issues)
    return [(issue.column, issue.value) for issue in issues]


def test_a_whole_checkpoint_leaves_nothing_unchecked(tiny: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path, checkpoint=str(tiny))
    assert (check(job).errors, check(job).warnings) == ([], [])
    assert make_plan(job).warnings == ()


@pytest.mark.parametrize("key", ["checkpoint", "text_encoder", "upsampler"])
def test_a_local_path_at_which_nothing_is_is_an_error(
    tiny: Path, tmp_path: Path, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = str(tmp_path / "absent")
    job = job_of(tmp_path, **{"checkpoint": str(tiny), key: absent})
    (error,) = check(job).errors
    assert (error.column, error.value) == (f"model.{key}", absent) and "absent" in str(error)
    with pytest.raises(LtxBatchError, match="absent"):
        run(job, RunOptions(skip_invalid=True))
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json", exclude_defaults=True)))
    assert main(["validate", str(file), "--skip-invalid", "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["errors"][0]["column"] == f"model.{key}"


@pytest.mark.parametrize("name", ["./absent", "nonsense", "/nowhere/at/all", "file:///nowhere", "out/no/such"])
def test_names_that_can_only_be_paths(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert told(foresee(ModelSpec(checkpoint=name)).errors) == [("model.checkpoint", name)]


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert told(check(job_of(tmp_path, checkpoint=str(tmp_path / "empty"))).errors) == [
        ("model.checkpoint", str(tmp_path / "empty"))
    ]
    assert told(check(job_of(tmp_path)).errors) == [("model.checkpoint", None)]


def test_what_a_preset_alone_leaves_unchecked_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    write_lora(tmp_path / "style.safetensors", random_pairs({"transformer_blocks.0.attn1.to_q": (32, 32)}))
    loras = [str(tmp_path / "style.safetensors")]
    sizes = {"defaults": {"height": 256, "width": 256}}
    job = job_of(tmp_path, sizes, pipeline_config="ltxv-13b-0.9.8-dev", loras=loras, device="cuda")
    found = check(job)
    assert found.errors == []
    rules = [issue.rule for issue in found.warnings if issue.file == "the job file"]
    assert [rule.partition(":")[0] for rule in rules] == [
        "prompts are not counted in tokens",
        "skip_block_list is not held against the transformer's blocks",
        "rows are planned with plain steps, as those of the releases from 0.9.5 on",
        "LoRA files are not held against the transformer",
    ]
    assert "the model hub does not give" in rules[2], "the reason is given"
    planned = make_plan(job).warnings
    assert [issue.rule for issue in planned[:3]] == rules[:3] and planned[3].rule.startswith("memory is not told")
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job.model_dump(mode="json", exclude_defaults=True)))
    assert main(["plan", str(file), "--json"]) == 0
    assert [one["rule"] for one in json.loads(capsys.readouterr().out)["warnings"]] == [one.rule for one in planned]
    assert main(["plan", str(file)]) == 0
    assert "rows are planned with plain steps" in " ".join(capsys.readouterr().out.split())


def test_a_missing_checkpoint_and_the_schedule_taken_for_it_are_told_by_plan(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    warnings = make_plan(job_of(tmp_path, checkpoint=absent)).warnings
    assert {issue.value for issue in warnings} == {absent}
    assert [any(text in issue.rule for issue in warnings) for text in ("no weights at", "plain steps")] == [True, True]


@pytest.mark.parametrize("blocks", ["[2]", "2", "[[], [0, 7]]"])
def test_blocks_that_the_transformer_does_not_have_are_an_error(tiny: Path, tmp_path: Path, blocks: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"timesteps: [1.0, 0.5]\nstg_scale: 1\nguidance_timesteps: [1.0, 0.5]\nskip_block_list: {blocks}\n"
    )
    found = check(job_of(tmp_path, checkpoint=str(tiny), pipeline_config=str(config)))
    assert told(found.errors) == [("model.pipeline_config", str(config))]
    assert "this transformer has blocks 0 to 1" in found.errors[0].rule
    config.write_text("timesteps: [1.0, 0.5]\nstg_scale: 1\nskip_block_list: [0, 1]\n")
    assert check(job_of(tmp_path, checkpoint=str(tiny), pipeline_config=str(config))).errors == []


def test_precisions_that_the_files_cannot_have_are_errors(tiny: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "int8-weight")
    assert main(["quantize", str(tiny), folder, "--precision", "int8-weight", "--text-precision", "int8-weight"]) == 0
    assert check(job_of(tmp_path, checkpoint=folder, precision="auto")).errors == []
    job = job_of(tmp_path, checkpoint=folder, precision="int8", text_precision="fp32")
    errors = check(job).errors
    assert told(errors) == [("model.precision", "int8"), ("model.text_precision", "fp32")]
    assert all("quantised already" in str(error) for error in errors)
    with pytest.raises(LtxBatchError, match="quantised already"):
        run(job)
    for device in ("cpu", "auto"):
        assert told(make_plan(job_of(tmp_path, checkpoint=folder, precision="int8", device=device)).warnings) == [
            ("model.precision", "int8")
        ]
    (error,) = check(job_of(tmp_path, checkpoint=str(tiny), precision="int8", skip_modules=["nothing"])).errors
    assert error.column == "model.precision" and "skip_modules: nothing matches no linear layer" in str(error)


def test_a_row_that_asks_for_such_blocks_is_told(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("timesteps: [1.0, 0.5]\nstg_scale: 0\nskip_block_list: [42]\n")
    job = job_of(tmp_path, checkpoint=str(tiny), pipeline_config=str(config))
    assert check(job).errors == [], "nothing is perturbed"
    rows = [{"prompt": "a red circle", "stg_scale": 1.0}, {"prompt": "a blue square"}]
    Path(job.manifest).with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = check(job.model_copy(update={"manifest": str(Path(job.manifest).with_suffix(".jsonl"))}))
    assert [(issue.row, issue.column, issue.value) for issue in found.errors] == [(0, "stg_scale", 1.0)]
    assert "blocks 0 to 1" in found.errors[0].rule


def test_a_fault_of_the_job_stops_a_run_before_it_starts(tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("timesteps: [1.0, 0.5]\nstg_scale: 1\nskip_block_list: [9]\n")
    with pytest.raises(ManifestError, match="the job file breaks 1 rule"):
        run(job_of(tmp_path, checkpoint=str(tiny), pipeline_config=str(config)), RunOptions(skip_invalid=True))
    assert not (tmp_path / "out" / "videos").exists()
