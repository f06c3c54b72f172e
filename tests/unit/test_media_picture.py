"""One frame as a PNG: every pixel, the texts that were passed in, and the same bytes each time."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ltx_batch.clip import Clip
from ltx_batch.errors import EncodeError, MediaError
from ltx_batch.job import VideoSpec
from ltx_batch.media import read_media, write_clip, write_picture
from ltx_batch.media.read import read_metadata


def frames(count: int = 1, height: int = 63, width: int = 95) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_every_pixel_comes_back(tmp_path: Path) -> None:
    write_picture(Clip(frames(), 8.0), tmp_path / "a.png", metadata={})
    assert np.array_equal(read_media(tmp_path / "a.png"), frames())
    write_picture(Clip(frames()[:, ::-1, ::2], 8.0), tmp_path / "b.png", metadata={})
    assert np.array_equal(read_media(tmp_path / "b.png"), frames()[:, ::-1, ::2])


def test_the_texts_are_those_passed_in_and_no_others(tmp_path: Path) -> None:
    texts = {"ltx_batch_key": "ab12", "ltx_batch_recipe": '{"a": 1, "b": "x=y;#\\z"}', "prompt": "two\nlines, 好"}
    write_picture(Clip(frames(), 8.0), tmp_path / "a.png", metadata=texts)
    assert read_metadata(tmp_path / "a.png") == texts
    write_picture(Clip(frames(), 8.0), tmp_path / "b.png", metadata={})
    assert read_metadata(tmp_path / "b.png") == {}


def test_the_same_frame_gives_the_same_bytes(tmp_path: Path) -> None:
    write_picture(Clip(frames(), 8.0), tmp_path / "a.png", metadata={"key": "k"})
    time.sleep(1.1)  # a time in the file would differ by now
    write_picture(Clip(frames(), 8.0), tmp_path / "b.png", metadata={"key": "k"})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_name_decides_what_is_written(tmp_path: Path) -> None:
    clip = Clip(frames(1, 64, 96), 8.0)
    assert (clip.suffix, Clip(frames(2), 8.0).suffix) == (".png", ".mp4")
    for name in ("a.png", "b.PNG", "c.mp4"):
        write_clip(clip, tmp_path / name, VideoSpec(crf=0), metadata={"key": name})
        assert read_media(tmp_path / name).shape == (1, 64, 96, 3)
        assert read_metadata(tmp_path / name) == {"key": name}
    assert [Image.open(tmp_path / name).format for name in ("a.png", "b.PNG")] == ["PNG", "PNG"]


def test_what_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(EncodeError, match="one frame, and the clip has 2"):
        write_picture(Clip(frames(2), 8.0), tmp_path / "a.png", metadata={})
    with pytest.raises(EncodeError, match=r"uint8 \[F, H, W, 3\]"):
        write_picture(Clip(frames()[0], 8.0), tmp_path / "a.png", metadata={})
    with pytest.raises(EncodeError, match="No such file or directory"):
        write_picture(Clip(frames(), 8.0), tmp_path / "absent" / "a.png", metadata={})
    assert list(tmp_path.iterdir()) == []


def test_texts_of_a_damaged_picture(tmp_path: Path) -> None:
    write_picture(Clip(frames(), 8.0), tmp_path / "a.png", metadata={"key": "k"})
    whole = (tmp_path / "a.png").read_bytes()
    for kept in (20, 40, 60):
        (tmp_path / "a.png").write_bytes(whole[:kept])
        with pytest.raises(MediaError, match=r"a\.png: .*read"):
            read_metadata(tmp_path / "a.png")
