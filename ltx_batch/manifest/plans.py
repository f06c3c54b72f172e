"""What only the pipeline config knows of a row: whether its size, schedule and guidance can be rendered at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from ltx_batch.errors import InvalidRow
from ltx_batch.job import RowDefaults
from ltx_batch.manifest.cells import Cells, Fault
from ltx_batch.recent import Recent
from ltx_batch.request import Condition, RenderRequest

_INPUT = "input_media_path"
_NUMBERS = ("height", "width", "num_frames", "num_inference_steps")
# A plan hangs on whether these are above a value, and not on what they are.
_SCALES = {"guidance_scale": 1.0, "stg_scale": 0.0}
_FIELDS = (*_NUMBERS, *_SCALES, "timesteps")
_COLUMNS = (*_FIELDS, _INPUT)
_REMEMBERED = 1024  # plans
Rows = NDArray[np.int64]


class _Doubt(Protocol):
    @property
    def columns(self) -> Sequence[str]: ...
    @property
    def rule(self) -> str: ...


class Planned(Protocol):
    @property
    def doubts(self) -> Sequence[_Doubt]: ...


Planner = Callable[[RenderRequest], Planned]


@dataclass(frozen=True, slots=True)
class Kind:
    """Rows of a table that have one plan, or that none can be made for, for one reason."""

    rows: Rows
    plan: Any  # what the planner gave, or InvalidRow
    own: frozenset[str]  # columns in which the rows have values of their own


@dataclass(frozen=True, slots=True)
class Told:
    """A rule and the rows that break it. Without `own` it is the job's value in `column` that does, or its config's."""

    rows: Rows
    column: str | None
    rule: str
    own: bool
    is_error: bool

    def faults(self) -> list[Fault]:
        return [Fault(int(row), self.column, self.rule) for row in self.rows]


class PlanLookup:
    """Plans each distinct combination of the columns that a plan hangs on once. Without a planner nothing is found."""

    def __init__(self, planner: Planner | None, defaults: RowDefaults) -> None:
        self._planner, self._defaults = planner, defaults
        self._plans: Recent[tuple[Any, ...], Any] = Recent(_REMEMBERED)

    def faults(self, cells: Cells) -> list[Fault]:
        """A fault for every row that cannot be planned; rows that break a rule in these columns are left alone."""
        return [fault for told in self.told(cells) if told.is_error for fault in told.faults()]

    def told(self, cells: Cells) -> Iterator[Told]:
        """The same by rule, and what can be planned but is hardly meant so."""
        for kind in self.kinds(cells):
            is_error = isinstance(kind.plan, InvalidRow)
            for one in (kind.plan,) if is_error else kind.plan.doubts:
                column = _column_of(one.columns, kind.own)
                own = column is None or column in kind.own or (column == _INPUT and _INPUT in cells)
                yield Told(kind.rows, column, str(one) if is_error else one.rule, own, is_error)

    def kinds(self, cells: Cells) -> Iterator[Kind]:
        """The rows without faults in these columns, by what they are planned as."""
        if self._planner is None:
            return
        names = [name for name in _COLUMNS if name in cells]
        for rows in _alike(cells, names):
            values = {name: cells.array(name)[int(rows[0])].as_py() for name in names}
            own = {name: value for name, value in values.items() if value is not None}
            yield Kind(rows, self._plan(self._defaults.fill(own), _INPUT in own), frozenset(own))

    def can_plan(self, request: RenderRequest) -> bool:
        """Whether a request with every default filled in can be planned."""
        values = {name: getattr(request, name) for name in _FIELDS}
        return self._planner is None or not isinstance(self._plan(values, request.input_media is not None), InvalidRow)

    def _plan(self, values: Mapping[str, Any], has_input: bool) -> Any:
        """What the planner gives for these values, or its InvalidRow."""
        known = {name: _known(name, values[name]) for name in _FIELDS}
        key = *known.values(), has_input
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = self._ask(known, has_input)
        return found

    def _ask(self, known: Mapping[str, Any], has_input: bool) -> Any:
        assert self._planner is not None
        try:
            return self._planner(
                RenderRequest(prompt="a", input_media=Condition("input") if has_input else None, **known)
            )
        except InvalidRow as error:
            return error


def _known(name: str, value: Any) -> Any:
    """A value as far as a plan hangs on it."""
    if name in _SCALES and value is not None:
        return _SCALES[name] + (value > _SCALES[name])
    return tuple(value) if isinstance(value, list) else value


def _column_of(columns: Sequence[str], own: frozenset[str]) -> str | None:
    """Of the columns of a rule, the first that these rows have; else the first."""
    return next((name for name in columns if name in own), columns[0] if columns else None)


def _alike(cells: Cells, names: Sequence[str]) -> Iterator[Rows]:
    """Rows that agree in these columns, those that have no fault in them."""
    sound = np.flatnonzero(~cells.bad(*_COLUMNS))
    if not len(sound):
        return
    kinds = np.zeros(len(sound), np.int64)
    for name in names:
        codes = _codes(cells, name)[sound]
        if codes.any():  # else all are null, as in a column that is not there
            kinds = np.unique(kinds * (int(codes.max()) + 1) + codes, return_inverse=True)[1].reshape(-1)
    order = np.argsort(kinds, kind="stable")
    starts = np.flatnonzero(np.diff(kinds[order])) + 1
    yield from (sound[rows] for rows in np.split(order, starts))


def _codes(cells: Cells, name: str) -> Rows:
    """A number for each value that `_known` tells apart, 0 for null."""
    array = cells.array(name)
    there = cells.present(name).astype(np.int64)
    if name == _INPUT or not there.any():
        return there
    if name in _SCALES:
        return there + (there > 0) * (cells.numbers(name) > _SCALES[name])
    if name == "timesteps":  # Arrow cannot number lists
        return np.unique([repr(values) if values else "" for values in array.to_pylist()], return_inverse=True)[1]
    return np.asarray(pc.fill_null(array.dictionary_encode().indices, -1), np.int64) + 1
