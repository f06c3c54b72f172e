"""`render`: one clip from a prompt, through the real renderer with a tiny untrained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ltx_batch.cli import main
from ltx_batch.media import read_media
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def render(checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    size = ["--height", "64", "--width", "96", "--num-inference-steps", "2", "--guidance-scale", "1"]
    named = ["--checkpoint", str(checkpoint), "--device", "cpu", "--json"]
    assert main(["render", "a red circle", "-o", str(output), *size, *named, *words]) == 0
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def test_video(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same seed gives the same clip, another one another."""
    words = ["--num-frames", "9", "--frame-rate", "8", "--seed"]
    facts = render(checkpoint, tmp_path / "new" / "clip.mp4", capsys, *words, "5")
    assert read_media(tmp_path / "new" / "clip.mp4").shape == (9, 64, 96, 3)
    assert [facts[name] for name in ("seed", "height", "width", "num_frames", "frame_rate")] == [5, 64, 96, 9, 8.0]
    again = render(checkpoint, tmp_path / "again.mp4", capsys, *words, "5")
    other = render(checkpoint, tmp_path / "other.mp4", capsys, *words, "6")
    assert facts["frames_sha256"] == again["frames_sha256"] != other["frames_sha256"]
    assert (tmp_path / "new" / "clip.mp4").read_bytes() == (tmp_path / "again.mp4").read_bytes()


def test_picture(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = render(checkpoint, tmp_path / "frame.png", capsys)
    assert np.asarray(Image.open(tmp_path / "frame.png")).shape == (64, 96, 3)
    assert facts["num_frames"] == 1


def test_clip_begins_with_an_image(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (96, 64), (200, 30, 30)).save(tmp_path / "red.png")
    words = ["--num-frames", "9", "--seed", "5"]
    plain = render(checkpoint, tmp_path / "plain.mp4", capsys, *words)
    begun = render(checkpoint, tmp_path / "begun.mp4", capsys, *words, "--image", str(tmp_path / "red.png"))
    assert begun["frames_sha256"] != plain["frames_sha256"]


def test_words_for_people(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--height", "64", "--width", "64", "--num-inference-steps", "1", "--checkpoint", str(checkpoint)]
    output = tmp_path / "frame.png"
    assert main(["render", "a red circle", "-o", str(output), *words, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"{output}: 64x64, 1 frames at 30 Hz, in ")


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--precision", "int7"], "unknown precision 'int7'"), (["--checkpoint", "/absent"], "/absent")],
)
def test_bad_input(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    named = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    assert main(["render", "a red circle", "-o", str(tmp_path / "clip.mp4"), *named, *words]) == 2
    assert said in capsys.readouterr().err
