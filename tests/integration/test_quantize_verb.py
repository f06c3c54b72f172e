"""`ltx-batch quantize`: checkpoints of every layout to folders that load as they are."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from official_file import RELEASES, write_official_file
from typer.testing import CliRunner

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.cli import app
from ltx_batch.cli import main as command_line
from ltx_batch.model.layers import transformer_stored
from tests.tiny_checkpoint import write_tiny_checkpoint

REQUEST = RenderRequest(prompt="a red circle", height=64, width=64, num_frames=9, num_inference_steps=2)
WIDE = {"num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128}


def quantize(*words: str | Path) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["quantize", *map(str, words), "--json"], catch_exceptions=False)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["int8", "int8-weight", "fp8", "bnb-int8"])
def test_a_folder_renders_what_its_source_does(tmp_path: Path, name: str) -> None:
    source = write_tiny_checkpoint(
        tmp_path / "source", transformer=WIDE, pipeline_config="stochastic_sampling: false\n"
    )
    told = quantize(source, tmp_path / "made", "--precision", name, "--device", "cpu")
    assert (told["precision"], told["quantized_layers"], told["skipped_layers"]) == (name, 16, 4)
    file = tmp_path / "made" / "transformer" / "diffusion_pytorch_model.safetensors"
    assert told["transformer_bytes"] == file.stat().st_size
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    weights = Path("vae/diffusion_pytorch_model.safetensors")
    assert (tmp_path / "made" / weights).samefile(source / weights)
    assert (tmp_path / "made" / "pipeline_config.yaml").read_text() == "stochastic_sampling: false\n"
    assert not (tmp_path / "made" / "pipeline_config.yaml").samefile(source / "pipeline_config.yaml")  # people edit it
    stored = transformer_stored(str(tmp_path / "made"))
    assert stored is not None and len(stored.source["transformer/diffusion_pytorch_model.safetensors"]) == 64
    expected = load_renderer(str(source), device="cpu", precision=name).render([REQUEST])[0]
    found = load_renderer(str(tmp_path / "made"), device="cpu").render([REQUEST])[0]
    assert found.ran["precision"] == name
    assert found.frames_sha256() == expected.frames_sha256()


@pytest.mark.parametrize("release", RELEASES)
def test_an_official_file_becomes_a_folder(tmp_path: Path, release: str) -> None:
    found = RELEASES[release]
    # 32 heads, as every release has.
    sizes = {"num_attention_heads": 32, "attention_head_dim": 2, "cross_attention_dim": 64}
    source = write_tiny_checkpoint(tmp_path / "source", transformer=sizes, vae=found.vae, scheduler=found.scheduler)
    file = write_official_file(source, tmp_path / "official.safetensors", release)
    told = quantize(file, tmp_path / "made", "--device", "cpu", "--hadamard-group", "0")
    assert told["quantized_layers"] == 16 and told["hadamard_group"] == 0
    options: dict[str, Any] = {"device": "cpu", "text_encoder": str(source)}
    expected = load_renderer(str(file), precision="int8", hadamard_group=0, **options).render([REQUEST])[0]
    clip = load_renderer(str(tmp_path / "made"), **options).render([REQUEST])[0]
    assert clip.frames_sha256() == expected.frames_sha256()


def test_the_transformer_is_small(tmp_path: Path) -> None:
    told = quantize("demo", tmp_path / "made", "--device", "cpu")
    assert told["share"] == round(told["transformer_bytes"] / told["bf16_bytes"], 4) < 0.65


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "{there}"], "is there already; name a folder that is not"),
        (["demo", "{made}", "--precision", "bf16"], "bf16 quantises nothing"),
        (["demo", "{made}", "--precision", "int7"], "unknown precision"),
        (["demo", "{made}", "--skip", "no.such"], "no.such matches no linear layer"),
        (["{there}", "{made}"], "is quantised already, as int8: name the original"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    there = tmp_path / "there"
    quantize("demo", there, "--device", "cpu")
    places = {"there": there, "made": tmp_path / "made"}
    assert command_line(["quantize", *(word.format(**places) for word in words), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
