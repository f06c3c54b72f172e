"""How `render` reads its lists: `--image FILE@FRAME:STRENGTH`, and the official script's own options."""

from __future__ import annotations

import pytest

from ltx_batch.cli.conditions import read_conditions

PATHS, FRAMES, STRENGTHS = "conditioning_media_paths", "conditioning_start_frames", "conditioning_strengths"


@pytest.mark.parametrize(
    ("text", "placed"),
    [
        ("a.png", ("a.png", 0, 1.0)),
        ("a.png@16", ("a.png", 16, 1.0)),
        ("a.png@16:0.7", ("a.png", 16, 0.7)),
        ("s3://bucket/a.png@8:.5", ("s3://bucket/a.png", 8, 0.5)),
        ("icon@2x.png", ("icon@2x.png", 0, 1.0)),
        ("shot@20@0", ("shot@20", 0, 1.0)),
        ("me@home/a.png", ("me@home/a.png", 0, 1.0)),
        ("a.png@-1", ("a.png", -1, 1.0)),
    ],
)
def test_a_file_with_its_place(text: str, placed: tuple[str, int, float]) -> None:
    found = read_conditions([text], {})
    assert tuple(found.columns[name][0] for name in (PATHS, FRAMES, STRENGTHS)) == placed
    assert not found.faults


def test_the_official_lists_stay_as_they_are() -> None:
    lists = {PATHS: ["a.png", "b.mp4"], FRAMES: [0, 16], STRENGTHS: []}
    found = read_conditions([], lists)
    assert found.columns == {PATHS: ["a.png", "b.mp4"], FRAMES: [0, 16]}
    assert found.typed(PATHS) is None


def test_every_wrong_word_is_told() -> None:
    found = read_conditions(["a.png@0:high", "b.png@8", "c.png@8:"], {PATHS: ["d.png"]})
    both, high, empty = found.faults
    assert "one or the other" in both
    assert high.startswith("--image a.png@0:high: 'high' is no strength")
    assert empty.startswith("--image c.png@8:: '' is no strength")
    assert found.columns[PATHS] == ("b.png",), "so that the rules of a row are held against the rest"
