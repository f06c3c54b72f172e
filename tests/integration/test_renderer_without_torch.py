"""What must work before, and without, torch: names, fingerprints, plans."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ltx_batch.errors import CheckpointError, JobError
from ltx_batch.foresight import tokenizer_file
from ltx_batch.job import ModelSpec
from ltx_batch.renderer import PACKAGED, checkpoint_fingerprint, load_planner, resolve_checkpoint
from ltx_batch.request import RenderRequest
from tests.tiny_checkpoint import write_tiny_checkpoint

REQUEST = RenderRequest(prompt="a", height=60, width=90, num_frames=16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), pipeline_config="timesteps: [1.0, 0.5]\n")


def test_fingerprints_and_plans_load_no_torch(tiny: Path) -> None:
    code = (
        "import sys; from ltx_batch.renderer import *; from ltx_batch.foresight import tokenizer_file; from ltx_batch.job import ModelSpec; from ltx_batch.request import RenderRequest;"
        "checkpoint_fingerprint(sys.argv[1]); tokenizer_file(ModelSpec(checkpoint=sys.argv[1])); resolve_precision('auto', 'cpu');"
        "assert load_planner(sys.argv[1])(RenderRequest(prompt='a')).passes[0].calls == 2;"
        "print([name for name in ('torch', 'diffusers', 'transformers', 'ray') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_fingerprint_is_the_sha256_of_each_file(tiny: Path) -> None:
    files = checkpoint_fingerprint(str(tiny))["files"]
    expected = {
        str(file.relative_to(tiny)): hashlib.sha256(file.read_bytes()).hexdigest() for file in tiny.rglob("*.*")
    }
    assert files == expected
    assert "pipeline_config.yaml" in files and "vae/diffusion_pytorch_model.safetensors" in files


def test_a_fingerprint_follows_the_content_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "elsewhere")
    (copy / "README.md").write_text("words")
    assert checkpoint_fingerprint(str(copy)) == checkpoint_fingerprint(str(tiny))
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert checkpoint_fingerprint(str(copy)) != checkpoint_fingerprint(str(tiny))


def test_a_planner_reads_the_folders_config_and_a_named_one(tiny: Path, tmp_path: Path) -> None:
    plan = load_planner(str(tiny))(REQUEST)
    assert (plan.passes[0].height, plan.passes[0].width, plan.passes[0].tokens, plan.passes[0].calls) == (64, 96, 18, 2)
    (tmp_path / "long.yaml").write_text("num_inference_steps: 9")
    assert load_planner(str(tiny), pipeline_config=str(tmp_path / "long.yaml"))(REQUEST).passes[0].calls == 9
    with pytest.raises(JobError, match="no pipeline config"):
        load_planner(str(tiny), pipeline_config="nowhere.yaml")


def test_a_planner_needs_the_scheduler(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    shutil.rmtree(copy / "scheduler")
    with pytest.raises(CheckpointError, match=r"lacks scheduler/scheduler_config.json; it holds latent_upsampler"):
        load_planner(str(copy))


def test_names(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltx_batch.renderer.PACKAGED", tmp_path)
    with pytest.raises(CheckpointError, match="packaged checkpoint is missing"):
        resolve_checkpoint("demo")
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("demo") == str(tmp_path / "demo")
    assert resolve_checkpoint("./demo") == "./demo"
    assert resolve_checkpoint("s3://bucket/demo") == "s3://bucket/demo"
    with pytest.raises(CheckpointError, match="no checkpoint is named"):
        load_planner("")
    assert PACKAGED.name == "checkpoints"


def test_the_tokenizers_file_is_found_where_it_is_local(tiny: Path) -> None:
    assert tokenizer_file(ModelSpec(checkpoint=str(tiny))) == (tiny / "tokenizer" / "tokenizer.json", [])
    for model in (ModelSpec(checkpoint="s3://bucket/weights"), ModelSpec(checkpoint="someone/model"), ModelSpec()):
        assert tokenizer_file(model)[0] is None
