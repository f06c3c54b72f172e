"""Conditioning media: every picture as it was meant, and a clear word for every file that is none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from ltx_batch.clip import Clip
from ltx_batch.errors import MediaError
from ltx_batch.job import VideoSpec
from ltx_batch.media import count_frames, read_media, write_video
from ltx_batch.media.read import _stream_colours, probe_video


@pytest.fixture
def picture() -> np.ndarray:
    rows, columns = np.mgrid[:48, :64]
    return np.stack([columns * 4, rows * 5, 255 - columns * 2], -1).astype(np.uint8)


def clip_file(path: Path, frames: int = 9) -> Path:
    shades = np.arange(frames, dtype=np.uint8)[:, None, None, None] * 20 + 30
    noise = np.random.default_rng(0).integers(0, 20, (frames, 64, 96, 3), dtype=np.uint8)
    write_video(Clip(shades + noise, 8.0), path, VideoSpec(crf=10), metadata={})
    return path


def encode(path: Path, *options: str, source: str = "color=red:s=96x64:d=1:r=4") -> Path:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "lavfi", "-i", source]
    subprocess.run([*command, *options, str(path)], check=True)
    return path


@pytest.mark.parametrize("suffix", ["png", "webp", "bmp", "tiff"])
def test_lossless_images(tmp_path: Path, picture: np.ndarray, suffix: str) -> None:
    path = tmp_path / f"picture.{suffix}"
    Image.fromarray(picture).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(read_media(path), picture[None])


def test_jpeg(tmp_path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).save(tmp_path / "picture.jpg", quality=95, subsampling=0)
    assert np.abs(read_media(tmp_path / "picture.jpg")[0].astype(int) - picture).mean() < 2


def test_the_suffix_is_not_believed(tmp_path: Path, picture: np.ndarray) -> None:
    Image.fromarray(picture).save(tmp_path / "picture.mp4", format="PNG")
    assert np.array_equal(read_media(tmp_path / "picture.mp4"), picture[None])
    clip_file(tmp_path / "clip.mp4").rename(tmp_path / "clip.png")
    assert read_media(tmp_path / "clip.png").shape == (9, 64, 96, 3)


def test_exif_turns_the_picture(tmp_path: Path, picture: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn by 90 degrees clockwise
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_media(tmp_path / "turned.png")[0], np.rot90(picture, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_laid_over_black(tmp_path: Path, mode: str) -> None:
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[:, :3] = (200, 200, 200, 255)
    pixels[:, 3:] = (200, 200, 200, 0 if mode == "P" else 128)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "alpha.png")
    read = read_media(tmp_path / "alpha.png")[0]
    assert read[0, 0].tolist() == [200] * 3
    assert read[0, 5].tolist() == ([0] * 3 if mode == "P" else [100] * 3)


def test_16_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    grey = np.array([[0, 257, 32896, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert read_media(tmp_path / "grey.png")[0, 0, :, 0].tolist() == [0, 1, 128, 255]


def test_one_bit_grey_and_cmyk(tmp_path: Path) -> None:
    for mode, suffix in (("1", "png"), ("L", "png"), ("CMYK", "tiff")):
        Image.new("RGB", (8, 6), "white").convert(mode).save(tmp_path / f"white.{suffix}")
        assert read_media(tmp_path / f"white.{suffix}").min() == 255


def test_an_animation_gives_its_frames(tmp_path: Path) -> None:
    shades = [Image.new("RGB", (8, 6), (shade,) * 3) for shade in (10, 90, 200)]
    shades[0].save(tmp_path / "a.webp", save_all=True, append_images=shades[1:], lossless=True)
    assert read_media(tmp_path / "a.webp")[:, 0, 0, 0].tolist() == [10, 90, 200]
    assert len(read_media(tmp_path / "a.webp", num_frames=2)) == 2


@pytest.mark.parametrize(("asked", "given"), [(None, 9), (1, 1), (4, 4), (9, 9), (50, 9)])
def test_as_many_frames_as_asked_for_and_there(tmp_path: Path, asked: int | None, given: int) -> None:
    path = clip_file(tmp_path / "clip.mp4")
    frames = read_media(path, num_frames=asked)
    assert frames.shape == (given, 64, 96, 3)
    assert np.array_equal(frames, read_media(path)[:given])


def test_frames_that_come_at_odd_times_are_read_once_each(tmp_path: Path) -> None:
    uneven = "testsrc=s=96x64:r=10:d=1,setpts='if(lt(N,5),N,N*4)/10/TB'"
    path = encode(tmp_path / "uneven.mkv", "-fps_mode", "vfr", source=uneven)
    assert len(read_media(path)) == 10


def test_a_turned_video_is_turned(tmp_path: Path) -> None:
    flat = encode(tmp_path / "flat.mp4", "-pix_fmt", "yuv420p", source="testsrc=s=96x64:d=1:r=4")
    turned = tmp_path / "turned.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-display_rotation", "90", "-i", str(flat)]
    subprocess.run([*command, "-c", "copy", str(turned)], check=True)
    difference = read_media(turned).astype(int) - np.rot90(read_media(flat), axes=(1, 2))
    assert np.abs(difference).mean() < 1  # chroma samples sit elsewhere in a turned picture


@pytest.mark.parametrize("matrix", ["bt709", "smpte170m", "bt2020nc"])
def test_the_tagged_matrix_is_used(tmp_path: Path, matrix: str) -> None:
    convert = f"scale=out_color_matrix={matrix.replace('nc', '').replace('smpte170m', 'bt601')}:out_range=tv"
    tags = ["-colorspace", matrix, "-pix_fmt", "yuv420p", "-vf", f"{convert},setparams=colorspace={matrix}:range=tv"]
    path = encode(tmp_path / "green.mp4", *tags, source="color=0x00FF00:s=96x64:d=1:r=4")
    assert np.abs(read_media(path)[0].astype(int) - (0, 255, 0)).max() <= 2


@pytest.mark.parametrize(("size", "matrix"), [("96x64", "bt601"), ("1280x720", "bt709")])
def test_untagged_video_is_read_as_players_do(tmp_path: Path, size: str, matrix: str) -> None:
    untag = f"scale=out_color_matrix={matrix}:out_range=tv,setparams=colorspace=unknown"
    source = f"color=0x00FF00:s={size}:d=0.5:r=4"
    path = encode(tmp_path / "green.mp4", "-vf", untag, "-pix_fmt", "yuv420p", source=source)
    assert np.abs(read_media(path)[0].astype(int) - (0, 255, 0)).max() <= 2


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("h264 (High) (avc1 / 0x31), yuv420p(tv, bt709, progressive), 64x48 [SAR 1:1], 8 fps", ("bt709", 48)),
        ("h264 (High), yuv420p(tv, smpte170m/unknown/bt709, top first), 64x480, 8 fps", ("smpte170m", 480)),
        ("h264 (High), yuv420p(tv, unknown/bt709/bt709), 64x720, 8 fps", (None, 720)),
        ("mpeg4 (Simple Profile), yuv420p, 64x48, 8 fps", (None, 48)),
        ("hevc (Main 10), yuv420p10le(10 bpc, pc, progressive), 64x48, 8 fps", (None, 48)),
    ],
)
def test_ffmpegs_description_of_a_stream(line: str, found: tuple[str | None, int]) -> None:
    assert _stream_colours(f"Input #0\n  Stream #0:0[0x1](und): Video: {line}\n") == found


def broken(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / kind
    if kind == "text.mp4":
        path.write_text("a text\nof two lines\n" * 50)
    elif kind == "empty.png":
        path.write_bytes(b"")
    elif kind == "cut.png":
        Image.effect_noise((64, 64), 50).save(path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "cut.mp4":
        path.write_bytes((whole := clip_file(tmp_path / "whole.mp4").read_bytes())[: len(whole) * 2 // 3])
    elif kind == "no-index.mp4":
        encode(path, "-movflags", "-faststart", "-pix_fmt", "yuv420p")
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "sound.wav":
        encode(path, source="sine=d=1")
    elif kind == "no-frames.mp4":
        encode(path, "-frames:v", "0", "-pix_fmt", "yuv420p")
    elif kind == "playlist.m3u8":
        path.write_text(f"#EXTM3U\n#EXTINF:1,\n{clip_file(tmp_path / 'whole.mp4')}\n#EXT-X-ENDLIST\n")
    elif kind == "folder":
        path.mkdir()
    return path


KINDS = ["text.mp4", "empty.png", "cut.png", "cut.mp4", "no-index.mp4", "sound.wav", "no-frames.mp4"]


@pytest.mark.parametrize("kind", [*KINDS, "playlist.m3u8", "folder", "absent.png"])
def test_what_is_no_media_is_named_with_its_reason(tmp_path: Path, kind: str) -> None:
    path = broken(tmp_path, kind)
    with pytest.raises(MediaError) as caught:
        read_media(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) > len(str(path)) + 5


def test_a_cut_video_still_gives_the_frames_that_are_whole(tmp_path: Path) -> None:
    path = broken(tmp_path, "cut.mp4")
    assert len(read_media(path, num_frames=2)) == 2


@pytest.mark.parametrize("begin_s", ["0.3", "1.2"])
def test_frames_before_the_begin_of_a_cut_do_not_count(tmp_path: Path, begin_s: str) -> None:
    """Cut without encoding anew a file still holds all since the last key frame, and a list says from where it plays."""
    whole = encode(tmp_path / "whole.mp4", "-g", "24", "-pix_fmt", "yuv420p", source="testsrc=s=96x64:d=2:r=24")
    cut = tmp_path / "cut.mp4"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-ss", begin_s, "-i", str(whole), "-c", "copy"]
    subprocess.run([*command, str(cut)], check=True)
    frames = len(read_media(cut))
    assert frames < 48 - 24 * float(begin_s) + 1
    assert count_frames(cut, at_most=1000) == frames
    assert count_frames(cut, at_most=frames - 1) == frames - 1
    assert probe_video(cut)[0] == frames


def test_probe_refuses_what_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"text\.mp4"):
        probe_video(broken(tmp_path, "text.mp4"))
