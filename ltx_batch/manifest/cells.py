"""Cells: a table's contract columns brought to the contract's types, and what is wrong with them.

Everything here works on whole columns, so that ten million sound rows take minutes; only faults are looked at one by one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ltx_batch.manifest.columns import COLUMNS, MAX_SEED, Column

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Fault:
    """A broken rule; `row` counts from 0 in the table. `column` None means the row."""

    row: int
    column: str | None
    rule: str


class Cells:
    """Contract columns of one table. A cell that cannot be brought to its type is a fault, and null from then on."""

    def __init__(self, table: pa.Table) -> None:
        self.rows = table.num_rows
        self.faults: list[Fault] = []
        self.arrays: dict[str, pa.Array] = {}
        self._bad: dict[str, Mask] = {}
        for name in table.column_names:
            if name in COLUMNS:
                self.arrays[name] = self._bring(COLUMNS[name], _flat(table.column(name)))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def array(self, name: str) -> pa.Array:
        """The column in the contract's type; nulls where the table has none."""
        return self.arrays[name] if name in self.arrays else pa.nulls(self.rows, COLUMNS[name].type)

    def present(self, name: str) -> Mask:
        """Which rows have a value. An empty list is one."""
        return _bools(pc.is_valid(self.array(name)))

    def bad(self, *names: str) -> Mask:
        """Rows that already have a fault in one of these columns: rules that compare columns leave them alone."""
        return np.logical_or.reduce([self._bad.get(name, np.zeros(self.rows, bool)) for name in names])

    def numbers(self, name: str, default: float = 0) -> NDArray[Any]:
        """A number column, `default` in place of null."""
        return np.asarray(pc.fill_null(self.array(name), default).to_numpy(zero_copy_only=False))

    def flag(self, name: str, wrong: Mask, rule: str) -> None:
        """Note a fault in each row that is marked."""
        self._bad[name] = self.bad(name) | wrong
        self.faults += [Fault(int(row), name, rule) for row in np.flatnonzero(wrong)]

    def flag_entries(self, name: str, wrong: Mask, rule: str) -> None:
        """Note a fault in each row that has a marked list entry; `wrong` runs over the flattened lists."""
        rows = np.zeros(self.rows, bool)
        rows[np.asarray(pc.list_parent_indices(self.array(name)))[wrong]] = True
        self.flag(name, rows, rule)

    def _bring(self, column: Column, array: pa.Array) -> pa.Array:
        if isinstance(array, pa.ExtensionArray):
            return self._parse(column, array.storage)
        if pa.types.is_string(array.type) and column.type != pa.string():
            return self._parse_numbers(column, array)
        if pa.types.is_null(array.type):
            return pa.nulls(len(array), column.type)
        if not column.is_list:
            values, wrong = _cast(column, array)
            self.flag(column.name, wrong, column.type_rule)
            return _nulled(values, wrong)
        return self._bring_lists(column, array)

    def _bring_lists(self, column: Column, array: pa.Array) -> pa.Array:
        values, wrong = _cast(column, pc.list_flatten(array))
        lengths = pc.list_value_length(array).cast(pa.int64())
        offsets = np.concatenate([[0], np.cumsum(pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False))])
        absent = pc.is_null(array)
        lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, mask=absent)
        self.arrays[column.name] = lists
        self.flag_entries(column.name, wrong, column.type_rule)
        return _nulled(lists, self.bad(column.name))

    def _parse_numbers(self, column: Column, array: pa.Array) -> pa.Array:
        """CSV text as numbers; the quick way fails on the first odd cell, the slow one names it."""
        if not column.is_list:
            try:
                return self._bring(column, array.cast(column.type))
            except pa.ArrowInvalid:
                pass
        return self._parse(column, array)

    def _parse(self, column: Column, texts: pa.Array) -> pa.Array:
        values: list[Any] = [None] * len(texts)
        wrong = np.zeros(len(texts), bool)
        for row, text in enumerate(texts.to_pylist()):
            if text is not None:
                values[row], wrong[row] = _value(column, text)
        example = ', as JSON, e.g. ["a.png"] or [0, 8]' if column.is_list else ""
        self.flag(column.name, wrong, column.type_rule + example)
        return pa.array(values, column.type)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # what older versions give for one chunk or none
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _cast(column: Column, array: pa.Array) -> tuple[pa.Array, Mask]:
    """Scalars in the contract's type, and which of them do not fit (null and NaN are looked at elsewhere)."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    wrong = np.zeros(len(array), bool)
    if column.kind == "int" and pa.types.is_floating(array.type):
        numbers = pc.fill_null(array, 0).to_numpy(zero_copy_only=False).astype(np.float64)
        wrong = ~((numbers == np.floor(numbers)) & (np.abs(numbers) < 2.0**63))
        array = _nulled(array, wrong)
    if pa.types.is_uint64(array.type) and column.kind == "int":
        wrong = _bools(pc.fill_null(pc.greater(array, pa.scalar(MAX_SEED, pa.uint64())), False))
        array = _nulled(array, wrong)
    scalar = column.type.value_type if column.is_list else column.type
    return array.cast(scalar), wrong


def _value(column: Column, text: str) -> tuple[Any, bool]:
    """A cell's JSON text as a value of the column, and whether it does not fit."""
    try:
        value = json.loads(text)
    except ValueError:
        return None, True
    if not column.is_list:
        fitted, wrong = _fit(column, value)
        return fitted, wrong
    if not isinstance(value, list):
        return None, True
    entries = [(None, False) if entry is None else _fit(column, entry) for entry in value]
    wrong = any(entry_wrong for _, entry_wrong in entries)
    return (None, True) if wrong else ([entry for entry, _ in entries], False)


def _fit(column: Column, value: Any) -> tuple[Any, bool]:
    if column.kind == "text":
        return (value, False) if isinstance(value, str) else (None, True)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, True
    if column.kind == "float":
        return float(value), False
    if not math.isfinite(value) or value != int(value) or not -MAX_SEED <= value <= MAX_SEED:
        return None, True
    return int(value), False


def _nulled(array: pa.Array, wrong: Mask) -> pa.Array:
    return pc.if_else(pa.array(wrong), pa.scalar(None, array.type), array) if wrong.any() else array


def _bools(array: pa.Array) -> Mask:
    return np.asarray(array.to_numpy(zero_copy_only=False), bool)


def texts_of(array: pa.Array) -> Sequence[str | None]:
    values: list[str | None] = array.to_pylist()
    return values
