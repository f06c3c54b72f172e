"""What only the pipeline config knows of a row: whether its size, schedule and guidance can be rendered at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ltx_batch.errors import InvalidRow
from ltx_batch.job import RowDefaults
from ltx_batch.manifest.cells import Cells, Fault, Mask
from ltx_batch.request import Condition, RenderRequest

Planner = Callable[[RenderRequest], Any]

_NUMBERS = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "stg_scale")
_LISTS = ("timesteps",)
_INPUT = "input_media_path"
# Columns that a rule may be about; an error names the one that its text begins with.
_NAMED = (*_NUMBERS, *_LISTS, "input_media")


class PlanLookup:
    """Plans each distinct combination of the columns that a plan hangs on once. Without a planner nothing is found."""

    def __init__(self, planner: Planner | None, defaults: RowDefaults) -> None:
        self._planner, self._defaults = planner, defaults.model_dump()
        self._faults: dict[tuple[Any, ...], tuple[str | None, str] | None] = {}

    def faults(self, cells: Cells) -> list[Fault]:
        """A fault for every row that cannot be planned; rows that break a rule in these columns are left alone."""
        if self._planner is None:
            return []
        found: list[Fault] = []
        for values, rows in self._combinations(cells):
            if values not in self._faults:
                self._faults[values] = self._plan(values)
            if (fault := self._faults[values]) is not None:
                found += [Fault(int(row), *fault) for row in rows]
        return found

    def _combinations(self, cells: Cells) -> list[tuple[tuple[Any, ...], Mask]]:
        """Values in the order of the names above, and the rows that have them."""
        sound = np.flatnonzero(~cells.bad(*_NUMBERS, *_LISTS, _INPUT))
        names = [name for name in (*_NUMBERS, *_LISTS) if name in cells]
        codes = [self._codes(cells, name) for name in names] + [cells.present(_INPUT).astype(np.int64)]
        kinds, firsts, members = np.unique(np.stack(codes)[:, sound], axis=1, return_index=True, return_inverse=True)
        combined = []
        for kind in range(kinds.shape[1]):
            row = int(sound[firsts[kind]])
            values = {name: cells.array(name)[row].as_py() for name in names}
            key = tuple(_frozen(values.get(name)) for name in (*_NUMBERS, *_LISTS))
            combined.append(((*key, bool(codes[-1][row])), sound[members.reshape(-1) == kind]))
        return combined

    def _codes(self, cells: Cells, name: str) -> Any:
        """One number for each distinct value."""
        array = cells.array(name)
        if name in _LISTS:  # few rows have their own
            texts = [None if values is None else repr(values) for values in array.to_pylist()]
            return np.unique([text or "" for text in texts], return_inverse=True)[1]
        return pc.fill_null(array.dictionary_encode().indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)

    def _plan(self, values: tuple[Any, ...]) -> tuple[str | None, str] | None:
        *given, has_input = values
        named = dict(zip((*_NUMBERS, *_LISTS), given, strict=True))
        filled = {name: self._defaults[name] if value is None else value for name, value in named.items()}
        media = Condition("input") if has_input else None
        assert self._planner is not None
        try:
            self._planner(RenderRequest(prompt="a", input_media=media, **filled))
        except InvalidRow as error:
            rule = str(error)
            column = next((name for name in _NAMED if rule.startswith(name)), None)
            return (_INPUT if column == "input_media" else column), rule
        return None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
