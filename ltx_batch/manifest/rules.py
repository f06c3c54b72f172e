"""The rules of a row: limits of single cells, and how columns must agree. No file is opened here."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ltx_batch.errors import RowIssue, job_issue
from ltx_batch.job import RowDefaults
from ltx_batch.manifest.cells import Cells, Fault, Mask
from ltx_batch.manifest.columns import COLUMNS, UNREADABLE
from ltx_batch.manifest.loras import check_loras

_SHA256 = "^[0-9a-f]{64}$"
_PATHS = "conditioning_media_paths"
_ORDER = {name: place for place, name in enumerate(COLUMNS)}
_BESIDE_PATHS = ("conditioning_start_frames", "conditioning_strengths", "conditioning_media_sha256")


def check(table: pa.Table, defaults: RowDefaults) -> tuple[Cells, list[Fault]]:
    """A table's contract columns, and every rule that a row breaks, in the order of the rows."""
    cells = Cells(table)
    _check_texts(cells)
    _check_numbers(cells)
    _check_timesteps(cells)
    _check_schedule(cells)
    _check_conditions(cells, defaults)
    check_loras(cells)
    unreadable = _unreadable(table)
    lost = {fault.row for fault in unreadable}  # a line that is no row breaks no other rule
    faults = unreadable + [fault for fault in cells.faults if fault.row not in lost]
    return cells, in_order(faults)


def in_order(faults: list[Fault]) -> list[Fault]:
    """By row, within a row by the contract's order of columns."""
    return sorted(faults, key=lambda fault: (fault.row, _ORDER.get(fault.column or "", -1)))


def check_defaults(defaults: RowDefaults) -> list[RowIssue]:
    """The rules of a row that the job's own values break."""
    values = {name: value for name, value in defaults.model_dump().items() if name in COLUMNS}
    row = {name: pa.array([value], COLUMNS[name].type) for name, value in values.items()}
    _, faults = check(pa.table({**row, "prompt": ["any"]}), defaults)
    return [job_issue(f"defaults.{fault.column}", values.get(fault.column or ""), fault.rule) for fault in faults]


def _unreadable(table: pa.Table) -> list[Fault]:
    if UNREADABLE not in table.column_names:
        return []
    reasons = table.column(UNREADABLE).to_pylist()
    return [Fault(row, None, f"the line {reason}") for row, reason in enumerate(reasons) if reason is not None]


def _check_texts(cells: Cells) -> None:
    missing = ~cells.present("prompt") & ~cells.bad("prompt")
    cells.flag("prompt", missing, "is missing")
    for name in ("prompt", "row_id", "input_media_path"):
        if name in cells:
            cells.flag(name, _blank(cells.array(name)), "is empty")


def _check_numbers(cells: Cells) -> None:
    for column in COLUMNS.values():
        if column.low is None or column.high is None or column.name not in cells:
            continue
        array = pc.list_flatten(cells.array(column.name)) if column.is_list else cells.array(column.name)
        there = _mask(pc.is_valid(array))
        values = pc.fill_null(array, 0).to_numpy(zero_copy_only=False)
        wrong = there & ~((values >= column.low) & (values <= column.high))  # so that NaN is wrong too
        flag = cells.flag_entries if column.is_list else cells.flag
        flag(column.name, wrong, column.limits_rule)
    for name in ("height", "width"):
        odd = cells.numbers(name) % 2 == 1
        cells.flag(name, odd, "must be even: video is stored as yuv420p")


def _check_timesteps(cells: Cells) -> None:
    if "timesteps" not in cells:
        return
    lists = cells.array("timesteps")
    cells.flag("timesteps", _mask(pc.fill_null(pc.equal(pc.list_value_length(lists), 0), False)), "is an empty list")
    values = pc.fill_null(pc.list_flatten(lists), np.nan).to_numpy(zero_copy_only=False)
    cells.flag_entries("timesteps", ~((values > 0) & (values <= 1)), "entries must be above 0 and at most 1")
    parents = np.asarray(pc.list_parent_indices(lists))
    rising = np.zeros(len(values), bool)
    rising[1:] = (parents[1:] == parents[:-1]) & (values[1:] >= values[:-1])
    cells.flag_entries("timesteps", rising, "must fall from entry to entry")


def _check_schedule(cells: Cells) -> None:
    both = cells.present("timesteps") & cells.present("num_inference_steps")
    cells.flag("num_inference_steps", both, "must be left out beside timesteps, which are the steps")


def _check_conditions(cells: Cells, defaults: RowDefaults) -> None:
    for name in (_PATHS, "conditioning_start_frames", "conditioning_strengths"):
        if name in cells:
            entries = pc.list_flatten(cells.array(name))
            cells.flag_entries(name, _mask(pc.is_null(entries)), "has a null entry")
    if _PATHS in cells:
        cells.flag_entries(_PATHS, _blank(pc.list_flatten(cells.array(_PATHS))), "has an empty entry")
    _check_lengths(cells)
    _check_start_frames(cells, defaults)
    if "conditioning_media_sha256" in cells:
        hashes = pc.list_flatten(cells.array("conditioning_media_sha256"))
        wrong = _mask(pc.fill_null(pc.invert(pc.match_substring_regex(hashes, _SHA256)), False))
        cells.flag_entries("conditioning_media_sha256", wrong, "entries must be 64 lower-case hex digits, or null")


def _check_lengths(cells: Cells) -> None:
    media = _lengths(cells, _PATHS)
    for name in _BESIDE_PATHS:
        known = ~cells.bad(name, _PATHS)
        needed = (media > 0) & ~cells.present(name) & known
        if name == "conditioning_start_frames":
            cells.flag(name, needed, f"is missing: give one frame for each of {_PATHS}")
        if name in cells:
            differs = cells.present(name) & (_lengths(cells, name) != media) & known
            cells.flag(name, differs, f"must have as many entries as {_PATHS}")


def _check_start_frames(cells: Cells, defaults: RowDefaults) -> None:
    name = "conditioning_start_frames"
    if name not in cells:
        return
    num_frames = cells.numbers("num_frames", default=defaults.num_frames)
    lists = cells.array(name)
    parents = np.asarray(pc.list_parent_indices(lists))
    frames = pc.fill_null(pc.list_flatten(lists), 0).to_numpy(zero_copy_only=False)
    outside = ~((frames >= 0) & (frames < num_frames[parents])) & ~cells.bad("num_frames")[parents]
    cells.flag_entries(name, outside, "entries must be frames of the clip: 0 to num_frames - 1")


def _lengths(cells: Cells, name: str) -> np.ndarray:
    return np.asarray(pc.fill_null(pc.list_value_length(cells.array(name)), 0).to_numpy(zero_copy_only=False))


def _blank(texts: pa.Array) -> Mask:
    """Which texts are there and hold nothing but white space."""
    lengths = pc.utf8_length(pc.utf8_trim_whitespace(texts))
    return _mask(pc.fill_null(pc.equal(lengths, 0), False))


def _mask(array: pa.Array) -> Mask:
    return np.asarray(array.to_numpy(zero_copy_only=False), bool)
