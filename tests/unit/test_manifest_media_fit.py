"""Media that lie here are opened: whether they can be read, are long enough, and may stand where they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ltx_batch.clip import Clip
from ltx_batch.job import JobSpec, VideoSpec
from ltx_batch.manifest import Manifest, Validation, validate
from ltx_batch.manifest.media_fit import MediaFit
from ltx_batch.media import write_clip
from ltx_batch.model.frames import MediaProbe
from tests.manifest_files import DEFAULTS, FORMATS, write, write_animation

PATHS, STARTS, INPUT = "conditioning_media_paths", "conditioning_start_frames", "input_media_path"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    Image.effect_noise((64, 48), 80).convert("RGB").save(folder / "still.png")
    Image.effect_noise((64, 48), 80).convert("RGB").save(folder / "still.jpg")
    for name in ("still.png", "still.jpg"):
        whole = (folder / name).read_bytes()
        (folder / f"cut-{name}").write_bytes(whole[: len(whole) // 2])
    damaged = bytearray((folder / "still.png").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "flipped.png").write_bytes(damaged)
    (folder / "empty.png").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(folder / "tiny.jpg")
    (folder / "text.mp4").write_bytes(b"no video")
    for count in (5, 12):
        frames = np.random.default_rng(0).integers(0, 255, (count, 64, 96, 3), np.uint8)
        write_clip(Clip(frames, 8.0), folder / f"{count}.mp4", VideoSpec(preset="ultrafast"), metadata={})
    write_animation(folder / "17.webp", 17)
    return folder


def check(folder: Path, rows: list[dict[str, Any]], kind: str = "jsonl") -> Validation:
    path = write(folder, [{"prompt": "a", "row_id": f"r{n}", **row} for n, row in enumerate(rows)], kind)
    job = JobSpec(manifest=str(path), output="o", defaults=DEFAULTS)
    return validate(Manifest.open(str(path)), job, tokenizer=None, probe=MediaProbe())


def placed(name: str, frame: int = 0, **more: Any) -> dict[str, Any]:
    return {PATHS: [name], STARTS: [frame], **more}


@pytest.mark.parametrize("kind", FORMATS)
def test_sound_media_are_no_fault(folder: Path, kind: str) -> None:
    rows = [
        placed("still.png", 3),
        placed("still.jpg"),
        placed("tiny.jpg"),
        placed("12.mp4", 8),
        placed("17.webp", num_frames=9),
        {INPUT: "17.webp"},
        {INPUT: "still.png", "num_frames": 1},
        {INPUT: "12.mp4", "num_frames": 9},
        {},
    ]
    found = check(folder, rows, kind)
    assert (found.errors, found.warnings) == ([], [])


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("cut-still.png", "the image cannot be read"),
        ("cut-still.jpg", "the image cannot be read"),
        ("flipped.png", "the image cannot be read"),
        ("empty.png", "is empty"),
        ("text.mp4", "neither an image nor a video"),
    ],
)
def test_files_that_cannot_be_read_are_told(folder: Path, name: str, rule: str) -> None:
    found = check(folder, [placed(name), {INPUT: name}, placed("still.png")])
    assert [(issue.row, issue.column) for issue in found.errors] == [(0, PATHS), (1, INPUT)]
    for issue in found.errors:
        assert f"{folder}/{name}" in issue.rule and rule in issue.rule


def test_videos_are_held_against_their_clip(folder: Path) -> None:
    rows = [
        placed("12.mp4", 3),
        {INPUT: "12.mp4"},
        {INPUT: "12.mp4", "num_frames": 12},
        {INPUT: "still.png"},
        {PATHS: ["still.png", "17.webp"], STARTS: [0, 4], "num_frames": 33},
        {PATHS: ["still.png", "17.webp"], STARTS: [3, 8], "num_frames": 33},
    ]
    found = check(folder, rows)
    assert [(issue.row, issue.column, issue.value) for issue in found.errors] == [
        (0, STARTS, [3]),
        (1, INPUT, "12.mp4"),
        (2, INPUT, "12.mp4"),
        (3, INPUT, "still.png"),
        (4, STARTS, [0, 4]),
    ]
    assert "must start at a multiple of 8, found frame 3" in found.errors[0].rule
    assert "has 12 frames, and the clip has 17 frames, which take 17" in found.errors[1].rule
    assert "num_frames 9 or less" in found.errors[2].rule
    assert "is a picture" in found.errors[3].rule
    assert "found frame 4" in found.errors[4].rule


def test_a_sequence_of_which_one_frame_is_taken_is_a_warning(folder: Path) -> None:
    found = check(folder, [placed("5.mp4"), placed("12.mp4", 16), placed("5.mp4", num_frames=1), placed("12.mp4", 8)])
    assert found.errors == []
    assert [(issue.row, issue.column) for issue in found.warnings] == [(0, PATHS), (1, PATHS)]
    assert f"of the 5 frames of {folder}/5.mp4 the first is taken" in found.warnings[0].rule


def test_a_missing_file_is_told_once(folder: Path) -> None:
    (issue,) = check(folder, [placed("gone.mp4")]).errors
    assert issue.rule == f"there is no file {folder}/gone.mp4"


def test_rows_with_other_faults_in_these_columns_are_left_alone(folder: Path) -> None:
    found = check(folder, [placed("12.mp4", 99), placed("12.mp4", 3, num_frames=-1)])
    assert [(issue.row, issue.column) for issue in found.errors] == [(0, STARTS), (1, "num_frames")]


def test_each_file_is_opened_once_and_pictures_and_videos_up_to_a_limit_each(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    class Noting(MediaProbe):
        def frames(self, path: str) -> int:
            opened.append(Path(path).name)
            return super().frames(path)

    limits = {"pictures": 2, "videos": 1}
    monkeypatch.setattr("ltx_batch.manifest.validation.MediaFit", lambda probe: MediaFit(Noting(), limits))
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "v.mp4").write_bytes((folder / "12.mp4").read_bytes())
    (tmp_path / "w.mp4").write_bytes(b"not looked into")
    names = ["a.png", "b.png", "c.png", "v.mp4", "w.mp4"] * 3
    found = check(tmp_path, [placed(name) for name in names])
    assert found.errors == [] and sorted(opened) == ["a.png", "b.png", "v.mp4"]
    (warning,) = found.warnings
    assert "were not opened" in warning.rule


def test_media_at_uris_are_not_opened(folder: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/media/a.mp4", b"no video")
    assert check(folder, [placed("memory://media/a.mp4")]).errors == []
