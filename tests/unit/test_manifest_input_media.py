"""The column `input_media_path`: where it is looked for, what it is held to, and its place in the key."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from ltx_batch.errors import MediaError
from ltx_batch.job import JobSpec
from ltx_batch.manifest import Manifest, hash_media, validate
from ltx_batch.request import Condition, RenderRequest
from tests.manifest_files import DEFAULTS, FORMATS, resolve, write

COLUMN = "input_media_path"


def rules(path: Path) -> dict[int | None, str]:
    found = validate(Manifest.open(str(path)), JobSpec(manifest="m", output="o", defaults=DEFAULTS), tokenizer=None)
    assert all(issue.column == COLUMN for issue in found.errors)
    return {issue.row: issue.rule for issue in found.errors}


def test_a_row_names_it_beside_its_manifest_or_anywhere(tmp_path: Path) -> None:
    paths = [None, "clips/a.mp4", "/media/b.mp4", "s3://bucket/c.mp4"]
    media = [None, f"{tmp_path}/clips/a.mp4", "/media/b.mp4", "s3://bucket/c.mp4"]
    rows = [{"prompt": "a", "row_id": f"r{n}", COLUMN: path} for n, path in enumerate(paths)]
    for kind in FORMATS:
        found = [row.request for row in resolve(write(tmp_path, rows, kind))]
        begins = [request and request.input_media for request in found]
        assert [begin and begin.media for begin in begins] == media, kind


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "here.mp4").write_bytes(b"video")
    rows = [{"prompt": "a", "row_id": f"r{n}", COLUMN: f"{name}.mp4"} for n, name in enumerate(("here", "gone"))]
    for kind in FORMATS:
        assert rules(write(tmp_path, rows, kind)) == {1: f"there is no file {tmp_path}/gone.mp4"}


def test_its_bytes_count_in_the_key_and_its_place_does_not(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"one")
    (tmp_path / "b.mp4").write_bytes(b"two")
    fsspec.filesystem("memory").pipe_file("/media/a.mp4", b"one")
    sources = (str(tmp_path / "a.mp4"), "memory://media/a.mp4", str(tmp_path / "b.mp4"))
    hashed = [hash_media(RenderRequest(prompt="a", input_media=Condition(source))) for source in sources]
    same, moved, other = (request.key({}) for request in hashed)
    assert same == moved != other
    assert RenderRequest(prompt="a").key({}) not in (same, other)


def test_hashing_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="there is no file"):
        hash_media(RenderRequest(prompt="a", input_media=Condition(str(tmp_path / "gone.mp4"))))
