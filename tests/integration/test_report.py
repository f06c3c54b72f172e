"""The contact sheet, from real videos on a local disk and in an object store."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from servers import S3Server

from ltx_batch.driver import run
from ltx_batch.errors import JobError
from ltx_batch.job import JobSpec, parse_job
from ltx_batch.report.contact_sheet import NAME, draw, write_contact_sheet
from ltx_batch.storage import Storage

WHITE, RED = (255, 255, 255), (255, 0, 0)
PAPER = (250, 250, 248)


def make_job(folder: Path, output: str, *prompts: str, **changes: Any) -> JobSpec:
    rows = [{"prompt": prompt, "seed": 0, "row_id": str(row)} for row, prompt in enumerate(prompts)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data: dict[str, Any] = {
        "manifest": str(folder / "rows.jsonl"),
        "output": output,
        "model": {"renderer": "fake", "device": "cpu", "precision": "fp32"},
        "workers": 0,
        "defaults": {"height": 64, "width": 128, "num_frames": 17, "frame_rate": 8},
        "attempts": {"max_attempts": 1},
    }
    return parse_job({**data, **changes})


def close(pixels: np.ndarray, colour: tuple[int, int, int]) -> bool:
    return bool(np.abs(pixels.astype(int) - colour).max() < 12)


def ink(pixels: np.ndarray) -> int:
    """Dark pixels: letters."""
    return int((pixels.max(axis=-1) < 100).sum())


@pytest.mark.parametrize("where", ["local", "s3"])
def test_sheet_shows_the_clips_and_their_prompts(tmp_path: Path, s3_server: S3Server, where: str) -> None:
    output = str(tmp_path / "out") if where == "local" else s3_server.uri("report")
    job = make_job(tmp_path, output, "colour bars that drift", "broken [raise]", "colour bars that drift")
    run(job)
    sheet = write_contact_sheet(job)
    assert (sheet.clips, sheet.ok, sheet.rows) == (1, 2, 3), "equal rows are one clip"
    assert sheet.path == f"{output}/{NAME}"
    picture = np.asarray(Image.open(io.BytesIO(Storage(output).read(NAME))).convert("RGB"))
    # A frame of 128 x 64 fills a cell's width. Bars are 16 pixels wide and drift one pixel a frame to the left: the first
    # frame begins with white, the last, 16 frames on, with yellow.
    cells = [picture[16 + 32 : 16 + 96, 16 + 132 * place : 16 + 132 * place + 128] for place in range(3)]
    assert close(cells[0][30:34, 4:12], WHITE)
    assert close(cells[1][30:34, 2:6], WHITE)
    assert close(cells[1][30:34, 10:14], (255, 255, 0))
    assert close(cells[2][30:34, 4:12], (255, 255, 0))
    assert ink(picture[16 + 128 :, :]) > 100, "the prompt stands below"
    assert close(picture[:10], PAPER)


def test_nothing_to_show_yet(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no finished shard of this job yet"):
        write_contact_sheet(make_job(tmp_path, str(tmp_path / "out"), "one"))


def test_sheet_stops_at_its_limit_and_leaves_unreadable_clips_blank(tmp_path: Path) -> None:
    job = make_job(tmp_path, str(tmp_path / "out"), *(f"clip {row} [sleep 0]" for row in range(5)))
    run(job)
    for video in Path(tmp_path, "out", "videos").rglob("*.mp4"):
        video.write_bytes(b"no video")
    sheet = write_contact_sheet(job, limit=4)
    assert (sheet.clips, sheet.ok) == (4, 5)
    picture = np.asarray(Image.open(sheet.path))
    assert close(picture[16:144, 16:144], (220, 220, 216))
    assert ink(picture[144:200, :400]) > 50


def test_long_prompts_stay_below_their_strip() -> None:
    frame = Image.new("RGB", (128, 128), RED)
    words = draw([("a red circle moves right over a dark background " * 8, [frame])])
    word = draw([("x" * 400, [frame])])
    for sheet in (words, word):
        pixels = np.asarray(sheet)
        assert sheet.size == (16 + 392 + 16, 16 + 128 + 51 + 16)
        assert ink(pixels[:, -14:]) == 0, "nothing runs out of the tile"
        assert ink(pixels[-12:]) == 0
    assert ink(np.asarray(words)) > 2 * ink(np.asarray(draw([("a red circle", [frame])])))
