"""The contact sheet: one PNG with first, middle and last frame of each clip, its prompt below."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ltx_batch.errors import JobError, MediaError
from ltx_batch.job import JobSpec
from ltx_batch.ledger import Ledger
from ltx_batch.manifest import Manifest
from ltx_batch.media import read_media
from ltx_batch.report.runs import find_run, read_lines
from ltx_batch.storage import Storage
from ltx_batch.worker import open_output

NAME = "report/contact_sheet.png"
MAX_CLIPS = 64

_FRAMES = 3
_CELL_PX = 128  # a frame fits into a square of this side
_GAP_PX = 4
_MARGIN_PX = 16
_TEXT_LINES = 3
_FONT_PX = 13
_LINE_PX = 17
_COLUMNS = 4
_STRIP_PX = _FRAMES * _CELL_PX + (_FRAMES - 1) * _GAP_PX
_TILE_PX = (_STRIP_PX + _MARGIN_PX, _CELL_PX + _TEXT_LINES * _LINE_PX + _MARGIN_PX)
_PAPER, _INK, _BLANK = (250, 250, 248), (32, 32, 32), (220, 220, 216)


@dataclass(frozen=True, slots=True)
class ContactSheet:
    """`path` is where the sheet lies, `clips` how many it shows, `ok` and `rows` what the finished shards hold; `unfinished`
    rows of the manifest are in none of them yet."""

    run: str
    path: str
    clips: int
    ok: int
    rows: int
    unfinished: int = 0


def write_contact_sheet(job: JobSpec, *, limit: int = MAX_CLIPS) -> ContactSheet:
    """Draw the first `limit` different clips of a job's finished shards into `OUT/report/`. Raises JobError before any
    shard is finished."""
    manifest = Manifest.open(job.manifest, options=job.storage.options)
    storage = open_output(job)
    ledger = Ledger(storage)
    run = find_run(job, manifest, ledger)
    clips: dict[str, str] = {}
    ok = rows = 0
    for table in read_lines(ledger, run) if run is not None else ():
        rows += table.num_rows
        for line in table.select(["ltx_status", "ltx_video", "prompt"]).to_pylist():
            if line["ltx_status"] == "ok":
                ok += 1
                if len(clips) < limit:
                    clips.setdefault(line["ltx_video"], line["prompt"])
    if run is None or not rows:
        raise JobError(f"{job.output} has no finished shard of this job yet: run the job first, then report")
    storage.replace(NAME, _png(draw([(prompt, _frames(storage, video)) for video, prompt in clips.items()])))
    return ContactSheet(run, storage.path(NAME), len(clips), ok, rows, manifest.rows - rows)


def draw(clips: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Tiles in rows: up to three frames each, and the prompt. A clip without frames stays blank."""
    columns = max(1, min(_COLUMNS, len(clips)))
    rows = max(1, -(-len(clips) // columns))
    size = (_MARGIN_PX + columns * _TILE_PX[0], _MARGIN_PX + rows * _TILE_PX[1])
    sheet = Image.new("RGB", size, _PAPER)
    font = ImageFont.load_default(_FONT_PX)
    for index, (prompt, frames) in enumerate(clips):
        row, column = divmod(index, columns)
        _draw_tile(sheet, _MARGIN_PX + column * _TILE_PX[0], _MARGIN_PX + row * _TILE_PX[1], prompt, frames, font)
    return sheet


def _draw_tile(sheet: Image.Image, left: int, top: int, prompt: str, frames: Sequence[Image.Image], font: Any) -> None:
    pen = ImageDraw.Draw(sheet)
    for place in range(_FRAMES):
        x = left + place * (_CELL_PX + _GAP_PX)
        if place < len(frames):
            picture = frames[place]
            sheet.paste(picture, (x + (_CELL_PX - picture.width) // 2, top + (_CELL_PX - picture.height) // 2))
        elif not frames:
            pen.rectangle((x, top, x + _CELL_PX - 1, top + _CELL_PX - 1), fill=_BLANK)
    for number, text in enumerate(_wrap(prompt, font)):
        pen.text((left, top + _CELL_PX + _GAP_PX + number * _LINE_PX), text, fill=_INK, font=font)


def _wrap(text: str, font: Any) -> list[str]:
    """Lines that fit below a strip; what does not fit ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= _STRIP_PX or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > _TEXT_LINES:
        lines = [*lines[: _TEXT_LINES - 1], f"{lines[_TEXT_LINES - 1]} …"]
    return [_cut(line, font) for line in lines]


def _cut(line: str, font: Any) -> str:
    """A single word may be wider than the strip."""
    while font.getlength(line) > _STRIP_PX:
        line = line.rstrip("…")[:-1] + "…"
    return line


def _frames(storage: Storage, video: str) -> list[Image.Image]:
    """First, middle and last frame, scaled into a cell; none where the video cannot be read."""
    try:
        if storage.is_local:
            frames = read_media(storage.path(video))
        else:
            with tempfile.TemporaryDirectory(prefix="ltx_batch-") as folder:
                target = Path(folder, "clip")
                storage.download(video, target)
                frames = read_media(target)
    except (MediaError, FileNotFoundError):
        return []
    wanted = sorted({0, len(frames) // 2, len(frames) - 1})
    return [_scaled(frames[index]) for index in wanted]


def _scaled(pixels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(pixels)
    scale = _CELL_PX / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)


def _png(picture: Image.Image) -> bytes:
    target = io.BytesIO()
    picture.save(target, "PNG", optimize=True)
    return target.getvalue()
