"""Which rows of two runs belong together, and what is said of the others; many clips as a few numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ltx_batch.quality.clips import ClipQuality, Score
from ltx_batch.quality.pictures import amplification, draw_pair
from ltx_batch.quality.rows import Line, Pair, RowQuality, join
from ltx_batch.quality.summary import aggregate

OK = {"ltx_status": "ok", "ltx_video": "videos/x.mp4", "ltx_frames_sha256": "f"}


def lines(*prompts: str, **columns: list[Any]) -> list[Line]:
    rows = [{name: values[row] for name, values in columns.items()} for row in range(len(prompts))]
    return [Line(0, row, {"prompt": prompt, **OK, **rows[row]}) for row, prompt in enumerate(prompts)]


def places(pairs: list[Pair]) -> list[tuple[int | None, int | None]]:
    return [(None if pair.a is None else pair.a.row, None if pair.b is None else pair.b.row) for pair in pairs]


@pytest.mark.parametrize(
    ("a", "b", "by", "expected"),
    [
        pytest.param(
            lines("x", "y", "z", row_id=["1", "2", "3"]),
            lines("other", "y", "new", row_id=["3", "2", "4"]),
            "row_id",
            [(0, None), (1, 1), (2, 0), (None, 2)],
            id="row_id, whatever the prompts are",
        ),
        pytest.param(
            lines("x", "y", row_id=[1, 2]),
            lines("x", "y", row_id=["2", "1"]),
            "row_id",
            [(0, 1), (1, 0)],
            id="a row_id is a name, also where one file has numbers",
        ),
        pytest.param(
            lines("x", "x", "y", seed=[1, 2, 1]),
            lines("y", "x", "x", seed=[1, 2, 1]),
            "content",
            [(0, 2), (1, 1), (2, 0)],
            id="prompt and seed where there is no row_id",
        ),
        pytest.param(
            lines("x", "y", row_id=["1", None]),
            lines("y", "x", row_id=["1", None]),
            "content",
            [(0, 1), (1, 0)],
            id="a row_id that some rows lack does not count",
        ),
        pytest.param(
            lines("x", "x", "x"), lines("x", "x"), "content", [(0, 0), (1, 1), (2, None)], id="equal rows, in turn"
        ),
        pytest.param(
            lines("x", "x", height=[64, 128]),
            lines("x", "x", height=[128, 64]),
            "content",
            [(0, 1), (1, 0)],
            id="one prompt in two sizes",
        ),
        pytest.param(
            lines("x", "y", "z", seed=[1, 1, 1]),
            lines("x", "other", "z", seed=[2, 2, 2]),
            "place",
            [(0, 0), (1, None), (2, 2), (None, 1)],
            id="other seeds everywhere: equal prompts at equal places",
        ),
    ],
)
def test_rows_find_their_partners(
    a: list[Line], b: list[Line], by: str, expected: list[tuple[int | None, ...]]
) -> None:
    joined_by, pairs = join(a, b)
    assert (joined_by, places(pairs)) == (by, expected)


def test_a_pair_says_what_is_wrong_with_it() -> None:
    good = Line(0, 0, {"prompt": "x", **OK})
    bad = Line(0, 0, {"prompt": "x", "ltx_status": "failed", "ltx_error_class": "MediaError", "ltx_error": "gone\nat"})
    bad.values["ltx_frames_sha256"] = None
    assert Pair(good, good).fault() is None
    assert Pair(None, good).fault() == ("only in B", "A has no finished line for it")
    assert Pair(good, None).fault() == ("only in A", "B has no finished line for it")
    assert Pair(good, bad).fault() == ("failed", "in B: MediaError: gone")
    assert Pair(bad, bad).fault() == ("failed", "in A: MediaError: gone; in B: MediaError: gone")
    assert (Pair(good, good).same_frames, Pair(good, bad).same_frames, Pair(good, None).same_frames) == (
        True,
        None,
        None,
    )


def test_a_row_without_a_name_is_called_by_its_place() -> None:
    assert Pair(None, Line(0, 7, {"prompt": "x"})).name == "row 7"
    assert Pair(Line(2, 7, {"prompt": "x"}), None).name == "file 2 row 7"
    assert Pair(Line(2, 7, {"prompt": "x", "row_id": 12}), None).name == "12"


def quality(mean: float, worst: float) -> ClipQuality:
    score = Score(mean, worst, 0)
    return ClipQuality(3, 64, 64, 0, psnr=score, ssim=score, lpips=score, vmaf=None)


def test_the_bad_end_of_a_metric_is_the_worst() -> None:
    pairs = [Pair(Line(0, row, {"prompt": "x"}), None) for row in range(102)]
    rows = [RowQuality(pair, quality(float(row), float(100 - row))) for row, pair in enumerate(pairs[:101])]
    found = aggregate([*rows, RowQuality(pairs[101], None, "failed", "in A")])
    assert found.keys() == {"psnr", "ssim", "lpips"}, "a metric that no row has is not there"
    assert (found["psnr"].clips, found["psnr"].median, found["psnr"].mean) == (101, 50, 50)
    assert (found["psnr"].p5, found["psnr"].worst, found["psnr"].worst_row) == (5, 0, "row 0")
    assert (found["psnr"].worst_frame, found["psnr"].worst_frame_row) == (0, "row 100")
    assert (found["lpips"].p5, found["lpips"].worst, found["lpips"].worst_row) == (95, 100, "row 100")


def test_differences_are_amplified_as_far_as_they_can_be() -> None:
    difference = np.zeros((10, 100), dtype=np.int16)
    assert amplification(difference) == 64
    difference[0, :5] = 200
    assert amplification(difference) == 64, "a few pixels may turn white"
    difference[:, :50] = 15
    assert amplification(difference) == 16
    difference[:, :50] = 255
    assert amplification(difference) == 1


def test_a_picture_shows_both_frames_and_their_difference() -> None:
    a = np.full((64, 96, 3), 100, dtype=np.uint8)
    b = a.copy()
    b[:32] += 10
    sheet = np.asarray(draw_pair(a, b, ("A", "B"), ("a caption", "x" * 500)))
    height, width = 64 * 4, 96 * 4
    assert sheet.shape == (8 + 3 * 20 + height + 8, 3 * width + 4 * 8, 3)
    panels = [sheet[68 : 68 + height, 8 + n * (width + 8) :][:, :width] for n in range(3)]
    assert (panels[0] == 100).all()
    assert (panels[1][: height // 2] == 110).all() and (panels[1][height // 2 :] == 100).all()
    assert (panels[2][: height // 2] == 160).all() and (panels[2][height // 2 :] == 0).all(), "10 x 16"
    assert (sheet[:, -8:] == (250, 250, 248)).all(), "a long caption ends within the picture"


def test_large_frames_are_drawn_smaller() -> None:
    frame = np.zeros((1080, 1920, 3), dtype=np.uint8)
    assert draw_pair(frame, frame, ("A", "B"), ()).size == (3 * 1280 + 32, 8 + 20 + 720 + 8)
