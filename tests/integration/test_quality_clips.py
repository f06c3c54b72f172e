"""The four metrics against what others compute: ffmpeg's psnr, libvmaf's ssim, lpips 0.1.4, and arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from ltx_batch.clip import Clip
from ltx_batch.errors import CheckpointError, MediaError
from ltx_batch.job import VideoSpec
from ltx_batch.media import write_video
from ltx_batch.media.ffmpeg import run_ffmpeg
from ltx_batch.model.lpips import Lpips
from ltx_batch.quality import compare_clips, metrics

Frames = np.ndarray


def pictures(seed: int, height: int, width: int, noise: float, frames: int = 1) -> tuple[Frames, Frames]:
    """Waves, and the same with Gaussian noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 100 * np.sin(x / 5 + seed), 127 + 100 * np.cos(y / 7), 127 + 100 * np.sin((x + y) / 11)]
    base = np.repeat(np.stack(waves, axis=-1)[None], frames, axis=0)
    noisy = base + random.normal(0, noise, base.shape)
    return _uint8(base), _uint8(noisy)


def _uint8(values: np.ndarray) -> Frames:
    return values.round().clip(0, 255).astype(np.uint8)


def test_equal_clips_are_equal() -> None:
    clip, _ = pictures(0, 64, 96, 0, frames=3)
    clip[1:] = np.roll(clip[1:], 4, axis=2)  # libvmaf wants motion before it says 100
    found = compare_clips(clip, clip.copy())
    assert (found.num_frames, found.height, found.width, found.identical_frames) == (3, 64, 96, 3)
    assert found.psnr is not None and found.psnr.mean == found.psnr.worst == 60.0
    assert found.ssim is not None and found.ssim.mean == pytest.approx(1, abs=1e-6)
    assert found.lpips is not None and found.lpips.mean == found.lpips.worst == 0.0
    assert found.vmaf is not None and found.vmaf.mean > 97


def test_a_known_error_has_its_known_psnr_and_the_worst_frame_is_found() -> None:
    a = np.full((4, 64, 64, 3), 128, dtype=np.uint8)
    b = a.copy()
    b[1] += 5
    b[2, ::2] += 25
    found = compare_clips(a, b)
    expected = [60, 20 * np.log10(255 / 5), 20 * np.log10(255 / 25) + 10 * np.log10(2), 60]
    assert found.psnr is not None and found.ssim is not None and found.lpips is not None and found.vmaf is not None
    assert found.psnr.mean == pytest.approx(np.mean(expected))
    assert (found.psnr.worst, found.psnr.worst_frame) == (pytest.approx(expected[2]), 2)
    assert [score.worst_frame for score in (found.ssim, found.lpips, found.vmaf)] == [2, 2, 2]
    assert found.identical_frames == 2
    told = found.as_dict()
    assert (told["psnr_worst"], told["psnr_worst_frame"]) == (found.psnr.worst, 2)


def test_psnr_is_that_of_ffmpeg() -> None:
    a, b = pictures(1, 64, 96, 12, frames=2)
    graph = "[0:v]format=gbrp,split[x][y];[x]crop=iw:64:0:0[a];[y]crop=iw:64:0:64[b];[a][b]psnr=stats_file=/dev/stdout"
    raw = ["-f", "rawvideo", "-pixel_format", "rgb24", "-video_size", "96x128", "-i", "pipe:0"]
    feed = (np.concatenate(pair).data.cast("B") for pair in zip(a, b, strict=True))
    stats, _ = run_ffmpeg([*raw, "-filter_complex", graph, "-f", "null", "-"], feed=feed, timeout_s=60)
    told = [float(line.split("psnr_avg:")[1].split()[0]) for line in stats.decode().splitlines()]
    assert metrics.psnr(a, b) == pytest.approx(told, abs=0.006), "ffmpeg prints two digits"


def test_ssim_is_that_of_the_paper() -> None:
    """Wang et al., 2004, equation 13, written out; the mean of three channels."""
    a, b = pictures(2, 48, 64, 20)
    weights = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(weights, weights) / weights.sum() ** 2

    def mean(values: np.ndarray) -> np.ndarray:
        places = np.lib.stride_tricks.sliding_window_view(values, (11, 11), axis=(0, 1))
        return np.asarray((places * window).sum(axis=(-1, -2)))

    x, y = a[0].astype(float), b[0].astype(float)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    expected = ((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert metrics.ssim(a, b) == pytest.approx([expected.mean()], abs=1e-5)


@pytest.mark.parametrize("noise", [4, 10, 40])
def test_ssim_is_near_that_of_libvmaf(noise: float) -> None:
    """On grey frames below 384 lines; larger ones it makes smaller first, and then says other things."""
    a, b = (np.repeat(frames[..., :1], 3, axis=-1) for frames in pictures(2, 120, 160, noise, frames=2))
    graph = (
        "[0:v]split[x][y];[x]crop=iw:120:0:0[a];[y]crop=iw:120:0:120[b];"
        "[b][a]libvmaf=feature=name=float_ssim:log_fmt=csv:log_path=/dev/stdout"
    )
    raw = ["-f", "rawvideo", "-pixel_format", "gray", "-video_size", "160x240", "-i", "pipe:0"]
    feed = (np.concatenate(pair)[..., 0].copy().data.cast("B") for pair in zip(a, b, strict=True))
    log, _ = run_ffmpeg([*raw, "-filter_complex", graph, "-f", "null", "-"], feed=feed, timeout_s=60)
    names, *lines = (line.split(",") for line in log.decode().splitlines())
    told = [float(line[names.index("float_ssim")]) for line in lines]
    assert metrics.ssim(a, b) == pytest.approx(told, abs=0.01)


# What lpips 0.1.4 (net="alex", float32, CPU) says of the same pictures.
@pytest.mark.parametrize(
    ("picture", "expected"),
    [((0, 64, 64, 5), 0.013332751579), ((1, 96, 160, 20), 0.229947060346), ((2, 33, 57, 60), 0.487788498402)],
)
def test_lpips_is_that_of_its_authors(picture: tuple[int, int, int, float], expected: float) -> None:
    a, b = pictures(*picture)
    assert Lpips()(a, b) == pytest.approx([expected], rel=1e-4)


def test_lpips_of_many_frames_is_that_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pictures(3, 64, 64, 30, frames=5)
    monkeypatch.setattr("ltx_batch.model.lpips._PIXELS_AT_ONCE", 2 * 64 * 64)
    alone = [float(Lpips()(a[at : at + 1], b[at : at + 1])[0]) for at in range(5)]
    assert Lpips()(a, b) == pytest.approx(alone, rel=1e-5)
    assert len(set(alone)) == 5


def test_vmaf_falls_with_the_quality_of_an_encoder(tmp_path: Path) -> None:
    a, _ = pictures(4, 128, 128, 0, frames=5)
    a = np.stack([np.roll(frame, 3 * at, axis=1) for at, frame in enumerate(a)])
    scores = []
    for crf in (10, 40, 51):
        write_video(Clip(a, 8.0), tmp_path / "clip.mp4", VideoSpec(crf=crf, preset="ultrafast"), metadata={})
        found = compare_clips(a, tmp_path / "clip.mp4").vmaf
        assert found is not None
        scores.append(found.mean)
    assert scores[0] > 90 and scores == sorted(scores, reverse=True) and scores[2] < 60


def test_vmaf_needs_64_pixels() -> None:
    found = compare_clips(*pictures(5, 62, 64, 5))
    assert found.vmaf is None and found.lpips is not None
    assert compare_clips(*pictures(5, 65, 67, 5)).vmaf is not None, "odd sizes are pictures too"


@pytest.mark.parametrize(
    ("shape", "fault"),
    [
        ((2, 64, 64, 3), "1 frames against 2"),
        ((1, 64, 96, 3), "64x64 pixels against 96x64"),
        ((1, 64, 64, 1), "frames must be uint8"),
    ],
)
def test_clips_of_other_shapes_are_refused(shape: tuple[int, ...], fault: str) -> None:
    with pytest.raises(MediaError, match=fault):
        compare_clips(np.zeros((1, 64, 64, 3), np.uint8), np.zeros(shape, np.uint8))


def test_tiny_clips_are_refused() -> None:
    tiny = np.zeros((1, 64, 16, 3), np.uint8)
    with pytest.raises(MediaError, match="need 32 a side"):
        compare_clips(tiny, tiny)


@pytest.fixture
def fresh() -> Iterator[None]:
    """What is available is looked at once a process."""
    caches = (metrics.unavailable, metrics._lpips)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_what_is_missing_is_said_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltx_batch.model.lpips.WEIGHTS", tmp_path / "alex.safetensors")
    monkeypatch.setitem(sys.modules, "skimage", None)
    found = compare_clips(*pictures(6, 64, 64, 5))
    assert found.lpips is None and found.ssim is None
    assert found.psnr is not None and found.vmaf is not None
    assert metrics.unavailable().keys() == {"lpips", "ssim"}
    assert "install ltx-batch again" in metrics.unavailable()["lpips"]
    assert "pip install 'ltx-batch[quality]'" in metrics.unavailable()["ssim"]


def test_other_weights_are_not_taken(tmp_path: Path) -> None:
    other = tmp_path / "alex.safetensors"
    other.write_bytes(b"not what was published")
    with pytest.raises(CheckpointError, match="has sha256"):
        Lpips(other)


def test_an_ffmpeg_without_libvmaf_is_told_from_one_with(tmp_path: Path) -> None:
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text(f'#!/bin/sh\n"{imageio_ffmpeg.get_ffmpeg_exe()}" "$@" | sed /libvmaf/d\n')
    ffmpeg.chmod(0o755)
    script = "from ltx_batch.media.vmaf import has_vmaf; print(has_vmaf())"
    answers = [
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, **extra}, capture_output=True, text=True, check=True
        ).stdout
        for extra in ({}, {"IMAGEIO_FFMPEG_EXE": str(ffmpeg)})
    ]
    assert answers == ["True\n", "False\n"]
