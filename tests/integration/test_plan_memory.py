"""What `plan` says of memory: from headers alone, and what the loaded model then is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from job_runs import make_job, write_manifest

from ltx_batch import load_renderer
from ltx_batch.cli import main
from ltx_batch.job import JobSpec
from ltx_batch.model import cards
from ltx_batch.model.checkpoint import TextParts
from ltx_batch.model.parts import open_checkpoint
from ltx_batch.model.quantize.policy import precision
from ltx_batch.model.sizes import sizes_of
from ltx_batch.plan import make_plan
from tests.tiny_checkpoint import write_tiny_checkpoint

CONFIG = "timesteps: [1.0, 0.7]\nguidance_scale: 3\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_checkpoint(folder, pipeline_config=CONFIG, transformer={"num_layers": 5})


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> JobSpec:
    return job_with(tiny, tmp_path)


def job_with(tiny: Path, folder: Path, **model: Any) -> JobSpec:
    manifest = write_manifest(folder, ["a red circle", "a blue square"])
    named = {"renderer": "ltx", "checkpoint": str(tiny), "device": "cuda", "precision": "bf16", **model}
    return make_job(manifest, folder / "out", model=named)


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int8-weight", "bnb-int8"])
def test_headers_tell_the_sizes_of_the_loaded_model(tiny: Path, name: str) -> None:
    told = sizes_of(open_checkpoint(tiny), precision(name, "cpu"))
    held = load_renderer(str(tiny), device="cpu", precision=name)._pipeline.placing._sizes
    assert len(told.blocks) == len(held.blocks) == 5
    for field in ("channels", "number_bytes", "precision", "upsampler_bytes"):
        assert getattr(told, field) == getattr(held, field)
    pairs = [(getattr(told, name), getattr(held, name)) for name in ("rest_bytes", "decoder_bytes", "encoder_bytes")]
    for headers, loaded in (*pairs, *zip(told.blocks, held.blocks, strict=True)):
        # Scales are not in the headers, and are a larger share of layers of 32 inputs than of 4096.
        assert 0.85 * loaded <= headers <= loaded
        assert headers == loaded or name not in ("fp32", "bf16")


def test_without_cards_a_plan_tells_what_is_wanted(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (shape,) = make_plan(job).as_dict()["shapes"]
    memory = shape["memory"]
    assert 0 < memory["least_bytes"] <= memory["resident_bytes"] and memory["placement"] is None


def test_a_plan_tells_the_placement_on_the_cards_that_are_named(tiny: Path, tmp_path: Path) -> None:
    roomy = make_plan(job_with(tiny, tmp_path, device_memory_gib=8)).shapes[0].memory
    tight = make_plan(job_with(tiny, tmp_path, device_memory_gib=0.6255)).shapes[0].memory
    assert roomy is not None and (roomy.placement, roomy.fits) == ("resident", True)
    assert tight is not None and tight.placement == "offload" and "resident wants" in str(tight.reason)
    assert make_plan(job_with(tiny, tmp_path, device="cpu")).shapes[0].memory is None
    assert make_plan(job_with(tmp_path / "absent", tmp_path)).shapes[0].memory is None


def test_a_plan_counts_the_text_encoder_where_workers_have_one(tiny: Path, tmp_path: Path) -> None:
    def memory_of(**job: Any) -> dict[str, Any]:
        made = job_with(tiny, tmp_path, device_memory_gib=8, **job.pop("model", {})).model_copy(update=job)
        return dict(make_plan(made).as_dict()["shapes"][0]["memory"])

    inline, staged, int8 = memory_of(), memory_of(text="stage"), memory_of(model={"text_precision": "int8"})
    told = (
        TextParts.find(tiny, "bfloat16").weights_bytes,
        TextParts.find(tiny, "bfloat16", precision="int8").weights_bytes,
    )
    assert inline["text"] == int8["text"] == "stays on the GPU" and staged["text"] is None
    assert inline["peak_bytes"] - int8["peak_bytes"] == told[0] - told[1] > 0
    assert int8["peak_bytes"] > staged["peak_bytes"]


def test_a_plan_says_where_a_text_encoder_is_missing(tiny: Path, tmp_path: Path) -> None:
    job = job_with(tiny, tmp_path, text_encoder=str(tmp_path / "absent"))
    said = [warning.rule for warning in make_plan(job).warnings if warning.column == "model.text_encoder"]
    assert any("its memory is not told" in rule for rule in said)


def test_the_drivers_tool_is_asked(job: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 79000\necho 1000\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert cards.free_bytes() == (79_000 * 2**20, 1_000 * 2**20)
    memory = make_plan(job).shapes[0].memory
    assert memory is not None and memory.placement == "resident" and "of 76.3 GiB" in str(memory.reason)
    tool.write_text("#!/bin/sh\necho no devices were found\nexit 9\n")
    assert cards.free_bytes() == ()


def test_people_read_it_too(job: JobSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    assert main(["plan", str(path), "--set", "model.device_memory_gib=24"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "memory of 32x32, 3 frames: 0.0 GiB with every part in place" in printed
    assert "resident, all parts and decode take 0.0 GiB of 23.1 GiB" in printed


def test_no_torch_is_loaded_for_it(job: JobSpec, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    script = "import sys; from ltx_batch.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", script, "plan", str(path), "--json", "--set", "model.device_memory_gib=24"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert json.loads(printed[0])["shapes"][0]["memory"]["placement"] == "resident"
    assert printed[-1] == "False"
