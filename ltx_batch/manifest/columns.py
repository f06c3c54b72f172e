"""The column contract: which columns a manifest may have, of which type and within which limits."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from ltx_batch.errors import RowIssue

Kind = Literal["text", "int", "float"]
MAX_TOKENS = (
    256  # of the prompt, end mark included; T5 cuts what is longer (Lightricks/LTX-Video, pipeline_ltx_video.py)
)
MAX_SEED = 2**63 - 1
RESERVED = "ltx_"  # the output's columns begin with it
UNREADABLE = "ltx_unreadable"  # why a line of a CSV or JSONL file is no row; only in row groups that have such lines


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the contract. `low` and `high` hold for the value or, in a list, for each entry."""

    name: str
    kind: Kind
    is_list: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def type(self) -> pa.DataType:
        """The type that its values are brought to."""
        scalar = {"text": pa.string(), "int": pa.int64(), "float": pa.float64()}[self.kind]
        return pa.list_(scalar) if self.is_list else scalar

    @property
    def type_name(self) -> str:
        noun = {"text": "text", "int": "a whole number", "float": "a number"}[self.kind]
        plural = {"text": "texts", "int": "whole numbers", "float": "numbers"}[self.kind]
        return f"a list of {plural}" if self.is_list else noun

    @property
    def type_rule(self) -> str:
        return f"must be {self.type_name}{' below 2^63' if self.kind == 'int' else ''}"

    @property
    def limits_rule(self) -> str:
        return f"{'entries ' if self.is_list else ''}must be {self.low} to {self.high}"


# Sizes and rates: the limits of this project. Scales: below 1 guidance is off in the official pipeline as it is at 1,
# so that a smaller value can only be a mistake; decode noise and decode timestep are fractions.
_CONTRACT = (
    Column("prompt", "text"),
    Column("row_id", "text"),
    Column("negative_prompt", "text"),
    Column("seed", "int", low=0, high=MAX_SEED),
    Column("height", "int", low=32, high=8192),
    Column("width", "int", low=32, high=8192),
    Column("num_frames", "int", low=1, high=1025),
    Column("frame_rate", "float", low=1, high=120),
    Column("num_inference_steps", "int", low=1, high=1000),
    Column("guidance_scale", "float", low=1, high=100),
    Column("stg_scale", "float", low=0, high=100),
    Column("timesteps", "float", is_list=True),
    Column("image_cond_noise_scale", "float", low=0, high=1),
    Column("decode_timestep", "float", low=0, high=1),
    Column("decode_noise_scale", "float", low=0, high=1),
    Column("conditioning_media_paths", "text", is_list=True),
    Column("conditioning_start_frames", "int", is_list=True),
    Column("conditioning_strengths", "float", is_list=True, low=0, high=1),
    Column("conditioning_media_sha256", "text", is_list=True),
    Column("input_media_path", "text"),
    Column("loras", "text", is_list=True),
    Column("priority", "int", low=-(2**31), high=2**31 - 1),
)
COLUMNS = {column.name: column for column in _CONTRACT}
# What other tools call ours. They are too common as columns of one's own to be refused.
_ELSEWHERE = {
    "fps": "frame_rate",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "image": "conditioning_media_paths",
    "image_path": "conditioning_media_paths",
}


def check_names(file: str, names: Iterable[str]) -> list[RowIssue]:
    """Broken rules of a header: no prompt, a name twice, a name that is the output's."""
    counts = Counter(names)
    rules = [(name, "the column is there twice") for name, count in counts.items() if count > 1]
    rules += [
        (name, f"names that begin with {RESERVED} are the output's own: rename the column")
        for name in counts
        if name.startswith(RESERVED)
    ]
    if "prompt" not in counts:
        near = [name for name in counts if nearest_column(name) == "prompt"]
        hint = f"; is it {near[0]!r}?" if near else ""
        rules.append(("prompt", f"the column is missing; it is the only one that must be there{hint}"))
    return [RowIssue(file, None, None, name, None, rule) for name, rule in rules]


def check_types(file: str, schema: pa.Schema) -> list[RowIssue]:
    """Columns of the contract whose Arrow type cannot hold what the contract says."""
    return [
        RowIssue(file, None, None, field.name, None, f"must be {COLUMNS[field.name].type_name}, is {field.type}")
        for field in schema
        if field.name in COLUMNS and not accepts(COLUMNS[field.name], field.type)
    ]


def near_misses(file: str, names: Iterable[str]) -> list[RowIssue]:
    """Warnings about columns that are carried untouched though they look like one of the contract."""
    near = ((name, nearest_column(name)) for name in names if name not in COLUMNS and not name.startswith(RESERVED))
    return [
        RowIssue(file, None, None, name, None, f"is carried untouched; if you mean {right}, rename it")
        for name, right in near
        if right is not None
    ]


def nearest_column(name: str) -> str | None:
    """The column of the contract that an unknown name most likely means."""
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    close = difflib.get_close_matches(plain, COLUMNS, n=1, cutoff=0.83)
    return close[0] if close else _ELSEWHERE.get(plain)


def accepts(column: Column, kind: pa.DataType) -> bool:
    """Whether values of an Arrow type may be this column's: any width, whole floats for ints, dictionaries, nulls."""
    if pa.types.is_dictionary(kind):
        return accepts(column, kind.value_type)
    if pa.types.is_null(kind):
        return True
    if column.is_list:
        return _is_list(kind) and accepts(Column(column.name, column.kind), kind.value_type)
    if column.kind == "text":
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_list(kind: pa.DataType) -> bool:
    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(test(kind) for test in (*tests, *views))
