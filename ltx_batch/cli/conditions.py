"""Lists on a command line: conditioning media as `--image FILE@FRAME:STRENGTH`, or as the official script has them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from typer.core import TyperCommand

PATHS, FRAMES, STRENGTHS = _COLUMNS = (
    "conditioning_media_paths",
    "conditioning_start_frames",
    "conditioning_strengths",
)
_PLACED = re.compile(r"(?P<path>.+)@(?P<frame>-?\d+)(:(?P<strength>[^/@]*))?")
_NEGATIVE = re.compile(r"-[\d.]")
_LISTS = frozenset(f"--{name.replace('_', '-')}" for name in (*_COLUMNS, "timesteps"))


@dataclass(frozen=True, slots=True)
class Conditions:
    """Columns of a manifest, as they were typed, and what is wrong with the typing itself."""

    columns: Mapping[str, Sequence[Any]]
    images: tuple[str, ...] = ()
    faults: tuple[str, ...] = ()

    def typed(self, column: str) -> str | None:
        """The words that a column came from, where they were not the column's own option."""
        return " ".join(f"--image {text}" for text in self.images) if self.images and column in _COLUMNS else None


def read_conditions(images: Sequence[str], lists: Mapping[str, Sequence[Any]]) -> Conditions:
    """`images` are `FILE[@FRAME[:STRENGTH]]`, `lists` the official script's three, by their names."""
    given = {name: values for name, values in lists.items() if values}
    if not images:
        return Conditions(given)
    faults = ["--image says all that the --conditioning options say: give one or the other"] if given else []
    placed = []
    for text in images:
        try:
            placed.append(_placed(text))
        except ValueError as error:
            faults.append(f"--image {text}: {error}")
    columns = dict(zip(_COLUMNS, zip(*placed, strict=True), strict=True)) if placed else {}
    return Conditions(columns, tuple(images), tuple(faults))


def _placed(text: str) -> tuple[str, int, float]:
    """Path, start frame and strength. A file whose own name ends in @20 is written FILE@20@0. Raises ValueError."""
    match = _PLACED.fullmatch(text)
    if match is None:
        return text, 0, 1.0
    strength = match["strength"]
    try:
        return match["path"], int(match["frame"]), 1.0 if strength is None else float(strength)
    except ValueError:
        raise ValueError(f"{strength!r} is no strength: write it as in last.png@16:0.7") from None


class WithLists(TyperCommand):
    """A verb that takes `--conditioning_media_paths A B` as the official script does; click wants the option before each."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_spread(args)))


def _spread(words: Iterable[str]) -> Iterator[str]:
    option, values = "", 0
    for word in words:
        if word.startswith("-") and not _NEGATIVE.match(word):
            name = word.replace("_", "-")
            option, values = name if name in _LISTS else "", 0
        elif option:
            values += 1
            if values > 1:
                yield option
        yield word
