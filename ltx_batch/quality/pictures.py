"""A pair of clips as a picture: the worst frame of each, and how they differ."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ltx_batch.quality.metrics import Frames

_PANEL_MIN_PX, _PANEL_MAX_PX = 256, 1280  # shorter sides are drawn larger, longer sides smaller
_MARGIN_PX, _LINE_PX, _FONT_PX = 8, 20, 14
_PAPER, _INK = (250, 250, 248), (32, 32, 32)
_GAINS = (64, 32, 16, 8, 4, 2, 1)


def draw_pair(a: Frames, b: Frames, titles: tuple[str, str], caption: Sequence[str]) -> Image.Image:
    """A, B and their amplified difference beside each other, from two frames uint8 RGB [H, W, 3].

    The gain, which the title tells, is the largest that leaves 99 of 100 values below white.
    """
    difference = np.abs(a.astype(np.int16) - b)
    gain = amplification(difference)
    amplified = np.clip(difference * gain, 0, 255).astype(np.uint8)
    panels = [_panel(frame) for frame in (a, b, amplified)]
    font = ImageFont.load_default(_FONT_PX)
    width, height = panels[0].size
    top = _MARGIN_PX + _LINE_PX * (len(caption) + 1)
    sheet = Image.new("RGB", (3 * width + 4 * _MARGIN_PX, top + height + _MARGIN_PX), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, text in enumerate(caption):
        pen.text((_MARGIN_PX, _MARGIN_PX + number * _LINE_PX), _cut(text, font, sheet.width), fill=_INK, font=font)
    for number, (panel, title) in enumerate(zip(panels, (*titles, f"difference x {gain}"), strict=True)):
        left = _MARGIN_PX + number * (width + _MARGIN_PX)
        pen.text((left, top - _LINE_PX), _cut(title, font, width), fill=_INK, font=font)
        sheet.paste(panel, (left, top))
    return sheet


def amplification(difference: np.ndarray) -> int:
    high = max(1.0, float(np.percentile(difference, 99)))
    return next(gain for gain in _GAINS if gain == 1 or gain * high <= 255)


def _panel(frame: Frames) -> Image.Image:
    picture = Image.fromarray(frame)
    if max(picture.size) > _PANEL_MAX_PX:
        picture.thumbnail((_PANEL_MAX_PX, _PANEL_MAX_PX), Image.Resampling.LANCZOS)
        return picture
    times = -(-_PANEL_MIN_PX // min(picture.size))  # whole pixels, so that nothing is smoothed over
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def _cut(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width - 2 * _MARGIN_PX:
        return text
    while text and font.getlength(f"{text}…") > width - 2 * _MARGIN_PX:
        text = text[:-1]
    return f"{text}…"
