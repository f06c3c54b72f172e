"""Pictures through H.264 and back: each as if it were alone, and as the official settings have it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from ltx_batch.errors import EncodeError
from ltx_batch.media import compress_frames, roundtrip


def pictures(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Flat, smooth and noisy in turn: what one of them needs in bits must not tell on the next."""
    random = np.random.default_rng(3)
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([columns * 3, rows * 4, 255 - columns * 2], -1) % 256
    kinds = [np.full((height, width, 3), 90), smooth, random.integers(0, 256, (height, width, 3))]
    return np.stack([np.roll(kinds[n % 3], n, axis=1) for n in range(count)]).astype(np.uint8)


def alone(frame: np.ndarray, folder: Path) -> np.ndarray:
    """A video of one frame with the settings of LTX-Video's crf_compressor.py, through an MP4 as there."""
    height, width = frame.shape[:2]
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", "-sws_flags", "bilinear"]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "1", "-i", "-"]
    settings = ["-pix_fmt", "yuv420p", "-c:v", "libx264", "-crf", "29", "-preset", "veryfast", "-threads", "1"]
    target = str(folder / "alone.mp4")
    subprocess.run([*ffmpeg, *raw, "-vf", "scale=flags=bilinear", *settings, target], input=frame.tobytes(), check=True)
    decode = [*ffmpeg, "-i", target, "-vf", "scale=flags=bilinear", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    data = subprocess.run(decode, capture_output=True, check=True).stdout
    return np.frombuffer(data, np.uint8).reshape(height, width, 3)


def test_each_picture_is_a_video_of_its_own(tmp_path: Path) -> None:
    frames = pictures(7)
    found = compress_frames(frames)
    assert found.shape == frames.shape and found.dtype == np.uint8
    for one, frame in zip(found, frames, strict=True):
        assert np.array_equal(one, alone(frame, tmp_path))


def test_what_goes_along_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = pictures(5)
    together = compress_frames(frames)
    monkeypatch.setattr(roundtrip, "_MOST_AT_ONCE", 2)  # 2 + 2 + 1
    assert np.array_equal(compress_frames(frames), together)
    monkeypatch.setattr(roundtrip, "_PIXELS_AT_ONCE", 1)  # pictures larger than that go one by one
    assert np.array_equal(compress_frames(frames), together)
    assert np.array_equal(compress_frames(frames[::-1])[::-1], together)


def test_it_costs_detail_and_keeps_the_picture() -> None:
    frames = pictures(3, 96, 128)
    errors = [np.abs(a.astype(int) - b).mean() for a, b in zip(compress_frames(frames), frames, strict=True)]
    assert errors[0] <= 2 and 0 < errors[1] < 8 and 5 < errors[2] < 60


@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 5), (2, 64), (17, 33)])
def test_odd_sizes_lose_their_last_line(height: int, width: int) -> None:
    frames = pictures(2, height, width)
    found = compress_frames(frames)
    assert found.shape == (2, height // 2 * 2, width // 2 * 2, 3)
    assert np.array_equal(found, compress_frames(frames[:, : height // 2 * 2, : width // 2 * 2]))


def test_too_small_to_compress() -> None:
    with pytest.raises(EncodeError, match="at least 2x2 pixels, found 8x1"):
        compress_frames(np.zeros((1, 1, 8, 3), np.uint8))


def test_a_failing_ffmpeg_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roundtrip, "_CODEC", ["-c:v", "libx264", "-preset", "no-such-preset", "-f", "h264"])
    with pytest.raises(EncodeError, match=r"could not be passed through H\.264: .*no-such-preset"):
        compress_frames(pictures(2))
