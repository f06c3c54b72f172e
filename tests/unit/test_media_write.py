"""Videos that show the colours they were given, carry the tags they should, and have the same bytes each time."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from ltx_batch.clip import Clip
from ltx_batch.errors import EncodeError
from ltx_batch.job import VideoSpec
from ltx_batch.media import ffmpeg, read_media, write_video
from ltx_batch.media.read import probe_video, read_metadata

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "skin": (224, 172, 105),
    "grey": (128, 128, 128),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
SPEC = VideoSpec(preset="veryfast")


def flat(colour: tuple[int, int, int], frames: int = 3) -> np.ndarray:
    return np.full((frames, 64, 96, 3), colour, np.uint8)


def moving(frames: int = 12, height: int = 64, width: int = 96) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    ramp = [np.stack([columns * 2 + 5 * f, rows * 3, 255 - columns - f], -1) for f in range(frames)]
    return (np.stack(ramp) % 256).astype(np.uint8)


def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", *arguments], capture_output=True)


@pytest.mark.parametrize("colour", COLOURS.values(), ids=COLOURS)
def test_flat_colours_come_back(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    target = tmp_path / "flat.mp4"
    write_video(Clip(flat(colour), 8.0), target, SPEC, metadata={})
    ours = read_media(target)
    assert ours.shape == (3, 64, 96, 3)
    assert np.abs(ours.astype(int) - flat(colour)).max() <= 2
    # A player that knows only that HD video is BT.709, whatever the tags say.
    to_rgb = "setparams=colorspace=bt709:range=tv,scale=in_color_matrix=bt709:in_range=tv:out_range=full"
    raw = run("-i", str(target), "-vf", to_rgb, "-pix_fmt", "rgb24", "-f", "rawvideo", "-").stdout
    theirs = np.frombuffer(raw, np.uint8).reshape(3, 64, 96, 3)
    assert np.abs(theirs.astype(int) - flat(colour)).max() <= 2


def test_the_file_is_tagged_bt709(tmp_path: Path) -> None:
    target = tmp_path / "clip.mp4"
    write_video(Clip(moving(), 24.0), target, SPEC, metadata={})
    log = run("-i", str(target)).stderr.decode()
    # ffmpeg writes one name where matrix, primaries and transfer are the same
    assert re.search(r"Video: h264 .*, yuv420p\(tv, bt709, progressive\), 96x64", log)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, threads: int) -> None:
    spec = VideoSpec(threads=threads)
    for name in ("a.mp4", "b.mp4"):
        write_video(Clip(moving(), 24.0), tmp_path / name, spec, metadata={"ltx_key": "k"})
        time.sleep(1.1 if threads == 1 else 0)  # a creation time would differ by now
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_the_index_comes_first(tmp_path: Path) -> None:
    target = tmp_path / "clip.mp4"
    write_video(Clip(moving(), 24.0), target, SPEC, metadata={})
    data = target.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_the_tags_are_those_passed_in_and_no_others(tmp_path: Path) -> None:
    target = tmp_path / "clip.mp4"
    tags = {"ltx_key": "ab12", "ltx_recipe": '{"a": 1, "b": "x=y;#\\z"}', "note": "two\nlines, ünïcode"}
    write_video(Clip(moving(), 24.0), target, SPEC, metadata=tags)
    assert read_metadata(target) == tags
    assert b"Lavf" not in target.read_bytes()
    write_video(Clip(moving(), 24.0), target, SPEC, metadata={})
    assert read_metadata(target) == {}


@pytest.mark.parametrize("rate", [8.0, 23.976, 24000 / 1001, 25.0, 29.97, 12.5, 1.0, 120.0])
@pytest.mark.parametrize("frames", [1, 9])
def test_frame_rates_and_counts_are_kept(tmp_path: Path, rate: float, frames: int) -> None:
    target = tmp_path / "clip.mp4"
    write_video(Clip(moving(frames), rate), target, SPEC, metadata={})
    assert probe_video(target) == (frames, 64, 96, pytest.approx(rate, rel=1e-6))
    assert len(read_media(target)) == frames


def test_detail_survives(tmp_path: Path) -> None:
    frames = moving(25, 128, 192)
    write_video(Clip(frames, 24.0), tmp_path / "clip.mp4", VideoSpec(crf=10), metadata={})
    error = read_media(tmp_path / "clip.mp4").astype(float) - frames
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 30


def test_crf_is_heard(tmp_path: Path) -> None:
    for crf in (10, 40):
        write_video(Clip(moving(), 24.0), tmp_path / f"{crf}.mp4", VideoSpec(crf=crf), metadata={})
    assert (tmp_path / "40.mp4").stat().st_size < 0.7 * (tmp_path / "10.mp4").stat().st_size


def test_frames_that_are_not_contiguous(tmp_path: Path) -> None:
    frames = moving()[::2, :, ::-1]
    write_video(Clip(frames, 8.0), tmp_path / "a.mp4", SPEC, metadata={})
    write_video(Clip(frames.copy(), 8.0), tmp_path / "b.mp4", SPEC, metadata={})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("frames", "rate", "reason"),
    [
        (np.zeros((2, 63, 64, 3), np.uint8), 8.0, "even"),
        (np.zeros((0, 64, 64, 3), np.uint8), 8.0, "F >= 1"),
        (np.zeros((2, 64, 64, 3), np.float32), 8.0, "float32"),
        (np.zeros((2, 64, 64, 3), np.uint8), 0.0, "positive"),
    ],
)
def test_clips_that_cannot_be_written(tmp_path: Path, frames: np.ndarray, rate: float, reason: str) -> None:
    with pytest.raises(EncodeError, match=reason):
        write_video(Clip(frames, rate), tmp_path / "clip.mp4", SPEC, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_ffmpegs_own_words_are_passed_on(tmp_path: Path) -> None:
    with pytest.raises(EncodeError, match="no-such-preset"):
        write_video(Clip(moving(), 8.0), tmp_path / "clip.mp4", VideoSpec(preset="no-such-preset"), metadata={})
    with pytest.raises(EncodeError, match="No such file or directory"):
        write_video(Clip(moving(), 8.0), tmp_path / "absent" / "clip.mp4", SPEC, metadata={})


def test_a_timeout_ends_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Seen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(ffmpeg.subprocess, "Popen", Seen)
    clip = Clip(np.zeros((400, 1024, 1024, 3), np.uint8), 24.0)
    with pytest.raises(EncodeError, match=r"stopped after 0\.2 s"):
        write_video(clip, tmp_path / "clip.mp4", VideoSpec(preset="placebo"), metadata={}, timeout_s=0.2)
    assert [process.poll() for process in started] == [-9]
    assert list(tmp_path.iterdir()) == []
