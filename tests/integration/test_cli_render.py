"""`render`: one clip from a prompt, through the real renderer with a tiny untrained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ltx_batch.cli import main
from ltx_batch.clip import Clip
from ltx_batch.job import VideoSpec
from ltx_batch.media import read_media, write_clip
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def render(checkpoint: Path, output: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    steps = [] if "--timesteps" in words else ["--num-inference-steps", "2"]
    size = ["--height", "64", "--width", "96", *steps, "--guidance-scale", "1"]
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


def test_a_pipeline_config_brings_its_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the demo's, whose picture would be taken for that of the config."""
    config = tmp_path / "named.yaml"
    config.write_text(f"checkpoint_path: {checkpoint}\ntimesteps: [1.0, 0.5]\n")
    words = [
        "render",
        "a",
        "-o",
        str(tmp_path / "a.png"),
        "--height",
        "64",
        "--width",
        "64",
        "--device",
        "cpu",
        "--json",
    ]
    named = ["--pipeline-config", str(config)]
    found = []
    for more in (named, [*named, "--checkpoint", str(checkpoint)], [*named, "--checkpoint", "demo"]):
        assert main([*words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["frames_sha256"])
    assert found[0] == found[1] != found[2]
    config.write_text("timesteps: [1.0, 0.5]\n")
    assert main([*words, *named]) == 2
    assert "no checkpoint is named" in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main([*words, "--pipeline-config", "ltxv-2b-0.9.8-distilled"]) == 2
    assert "`ltx-batch fetch ltxv-2b-0.9.8-distilled`" in capsys.readouterr().err


def test_words_for_people(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--height", "64", "--width", "64", "--num-inference-steps", "1", "--checkpoint", str(checkpoint)]
    output = tmp_path / "frame.png"
    assert main(["render", "a red circle", "-o", str(output), *words, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"{output}: 64x64, 1 frame at 30 Hz, in ")


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """Two pictures, a clip of 17 frames, and a file that is none."""
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (96, 64), colour).save(tmp_path / f"{name}.png")
    frames = np.zeros((17, 64, 96, 3), np.uint8)
    frames[:, :, 48:] = 255
    write_clip(Clip(frames, 8.0), tmp_path / "clip.mp4", VideoSpec(), metadata={})
    (tmp_path / "junk.png").write_text("junk")
    return tmp_path


def test_several_media_have_frames_and_strengths(
    checkpoint: Path, media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each counts, and the official script's options mean the same."""
    red, blue, clip = (str(media / name) for name in ("red.png", "blue.png", "clip.mp4"))
    words = ["--num-frames", "25", "--seed", "5"]
    both = ["--image", red, "--image", f"{blue}@12:0.8", "--video", f"{clip}@16"]
    official = ["--conditioning_media_paths", red, blue, clip, "--conditioning_start_frames", "0", "12", "16"]
    hashes = {
        name: render(checkpoint, media / "out.mp4", capsys, *words, *more)["frames_sha256"]
        for name, more in {
            "both": both,
            "official": [*official, "--conditioning_strengths", "1", "0.8", "1"],
            "one": both[:2],
            "two": both[:4],
            "stronger": [*both[:2], "--image", f"{blue}@12", *both[4:]],
            "earlier": [*both[:2], "--image", f"{blue}@11:0.8", *both[4:]],
        }.items()
    }
    assert hashes.pop("official") == hashes["both"]
    assert len(set(hashes.values())) == len(hashes)


def test_begins_from_input_media(checkpoint: Path, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--num-frames", "17", "--seed", "5", "--timesteps", "0.7", "0.4"]
    plain = render(checkpoint, media / "plain.mp4", capsys, *words)
    begun = render(checkpoint, media / "begun.mp4", capsys, *words, "--input-media", str(media / "clip.mp4"))
    assert begun["frames_sha256"] != plain["frames_sha256"]


def test_all_wrong_arguments_are_told_at_once(
    checkpoint: Path, media: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = {
        "": "PROMPT: is empty",
        f"--image={media}/absent.png": f"there is no file {media}/absent.png",
        f"--image={media}/red.png@3:high": "'high' is no strength",
        "--height=63": "--height 63: must be even",
        "--num-frames=5000": "--num-frames 5000: must be 1 to 1025",
        "--timesteps=1.5": "--timesteps 1.5: entries must be above 0 and at most 1",
        "--precision=int7": "--precision int7: ",
        "--device=tpu": "--device tpu: ",
        "--pipeline-config=nowhere.yaml": "no pipeline config at nowhere.yaml",
        f"-o{media}/clip.gif": "ends in .mp4 or .png",
        f"--lora={media}/absent.safetensors": "absent.safetensors",
        "--checkpoint": "",
        str(checkpoint): "",
    }
    assert main(["render", *typed]) == 2
    told = capsys.readouterr().err
    assert [said for said in typed.values() if said not in told] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "{media}/junk.png"], "junk.png: neither an image nor a video"),
        (["--image", "{media}/red.png@17"], "entries must be frames of the clip"),
        (["--video", "{media}/clip.mp4@4"], "must start at a multiple of 8"),
        (["--conditioning_media_paths", "{media}/red.png"], "--conditioning-start-frames: is missing"),
        (["--input-media", "{media}/clip.mp4", "--timesteps", "0.5", "--num-frames", "25"], "give a longer video"),
        (["--input-media", "{media}/red.png", "--timesteps", "0.5"], "is a picture, and the clip has 17 frames"),
        (["--height", "2"], "must be 32 to 8192"),
        (["-o", "{media}/junk.png/clip.mp4"], "is no folder that can be written to"),
    ],
)
def test_wrong_media_exit_2_before_a_model_is_loaded(
    checkpoint: Path, media: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (checkpoint_without_weights := media / "model").mkdir()
    for name in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        (checkpoint_without_weights / name).parent.mkdir()
        (checkpoint_without_weights / name).write_bytes((checkpoint / name).read_bytes())
    size = ["--height", "64", "--width", "96", "--num-frames", "17", "--checkpoint", str(checkpoint_without_weights)]
    given = ["-o", str(media / "out.mp4"), *size, *(word.format(media=media) for word in words)]
    assert main(["render", "a red circle", *given]) == 2
    assert said in capsys.readouterr().err


def test_a_failed_render_exits_1(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ltx_batch.media.write_clip", full)
    words = ["--height", "64", "--width", "64", "--num-inference-steps", "1", "--checkpoint", str(checkpoint)]
    assert main(["render", "a red circle", "-o", str(tmp_path / "frame.png"), *words, "--device", "cpu"]) == 1
    assert "the render failed with OSError: [Errno 28] No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--precision", "int7"], "--precision int7"), (["--checkpoint", "/absent"], "/absent")],
)
def test_bad_input(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    named = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    assert main(["render", "a red circle", "-o", str(tmp_path / "clip.mp4"), *named, *words]) == 2
    assert said in capsys.readouterr().err
