"""Every rule of the column contract, with the exact row, column, value and words, in each format that can break it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from manifest_files import DEFAULTS, FORMATS, resolve, write

from ltx_batch.errors import ManifestError
from ltx_batch.job import JobSpec, RowDefaults
from ltx_batch.manifest import Manifest, seed_of, validate
from ltx_batch.manifest.columns import nearest_column
from ltx_batch.manifest.rules import check_defaults
from ltx_batch.request import Condition, RenderRequest

PATHS, FRAMES = "conditioning_media_paths", "conditioning_start_frames"
STRENGTHS, HASHES = "conditioning_strengths", "conditioning_media_sha256"
ONE = {PATHS: ["a.png"], FRAMES: [0]}
TWO = {PATHS: ["a.png", "b.png"], FRAMES: [0, 8]}
INSIDE = "entries must be frames of the clip: 0 to num_frames - 1"
AS_MANY = f"must have as many entries as {PATHS}"
EVEN = "must be even: video is stored as yuv420p"

# what a good row is changed to, the column at fault, the rule
BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "is missing"),
    ({"prompt": " \n "}, "prompt", "is empty"),
    ({"row_id": " "}, "row_id", "is empty"),
    ({"seed": -1}, "seed", "must be 0 to 9223372036854775807"),
    ({"height": 30}, "height", "must be 32 to 8192"),
    ({"height": 8194}, "height", "must be 32 to 8192"),
    ({"height": 129}, "height", EVEN),
    ({"width": 0}, "width", "must be 32 to 8192"),
    ({"width": 8194}, "width", "must be 32 to 8192"),
    ({"width": 33}, "width", EVEN),
    ({"num_frames": 0}, "num_frames", "must be 1 to 1025"),
    ({"num_frames": 1026}, "num_frames", "must be 1 to 1025"),
    ({"frame_rate": 0.5}, "frame_rate", "must be 1 to 120"),
    ({"frame_rate": 120.5}, "frame_rate", "must be 1 to 120"),
    ({"frame_rate": float("inf")}, "frame_rate", "must be 1 to 120"),
    ({"frame_rate": float("nan")}, "frame_rate", "must be 1 to 120"),
    ({"num_inference_steps": 0}, "num_inference_steps", "must be 1 to 1000"),
    ({"num_inference_steps": 1001}, "num_inference_steps", "must be 1 to 1000"),
    ({"guidance_scale": 0.9}, "guidance_scale", "must be 1 to 100"),
    ({"guidance_scale": 101.0}, "guidance_scale", "must be 1 to 100"),
    ({"stg_scale": -0.1}, "stg_scale", "must be 0 to 100"),
    ({"image_cond_noise_scale": 1.5}, "image_cond_noise_scale", "must be 0 to 1"),
    ({"decode_timestep": -0.1}, "decode_timestep", "must be 0 to 1"),
    ({"decode_noise_scale": 1.1}, "decode_noise_scale", "must be 0 to 1"),
    ({"timesteps": []}, "timesteps", "is an empty list"),
    ({"timesteps": [1.0, 0.5, 0.0]}, "timesteps", "entries must be above 0 and at most 1"),
    ({"timesteps": [1.5, 0.5]}, "timesteps", "entries must be above 0 and at most 1"),
    ({"timesteps": [1.0, 0.5, 0.5]}, "timesteps", "must fall from entry to entry"),
    ({**ONE, FRAMES: None}, FRAMES, f"is missing: give one frame for each of {PATHS}"),
    ({**ONE, FRAMES: [0, 1]}, FRAMES, AS_MANY),
    ({FRAMES: [0]}, FRAMES, AS_MANY),
    ({**TWO, STRENGTHS: [1.0]}, STRENGTHS, AS_MANY),
    ({STRENGTHS: [1.0]}, STRENGTHS, AS_MANY),
    ({**ONE, HASHES: []}, HASHES, AS_MANY),
    ({**ONE, FRAMES: [-1]}, FRAMES, INSIDE),
    ({**ONE, FRAMES: [17]}, FRAMES, INSIDE),
    ({**ONE, FRAMES: [9], "num_frames": 9}, FRAMES, INSIDE),
    ({**TWO, STRENGTHS: [1.0, 1.01]}, STRENGTHS, "entries must be 0 to 1"),
    ({**ONE, STRENGTHS: [-0.5]}, STRENGTHS, "entries must be 0 to 1"),
    ({**TWO, PATHS: ["a.png", " "]}, PATHS, "has an empty entry"),
    ({**TWO, PATHS: ["a.png", None]}, PATHS, "has a null entry"),
    ({**TWO, FRAMES: [0, None]}, FRAMES, "has a null entry"),
    ({**TWO, STRENGTHS: [0.5, None]}, STRENGTHS, "has a null entry"),
    ({**ONE, HASHES: ["abc"]}, HASHES, "entries must be 64 lower-case hex digits, or null"),
    ({"input_media_path": " "}, "input_media_path", "is empty"),
    ({"priority": 2**31}, "priority", "must be -2147483648 to 2147483647"),
]


def test_all_of_them_in_one_manifest(tmp_path: Path) -> None:
    names = dict.fromkeys(name for change, _, _ in BROKEN for name in change)
    rows = [dict.fromkeys(names) | {"prompt": "a", "seed": 0} | change for change, _, _ in BROKEN]
    for kind in FORMATS:
        manifest = Manifest.open(str(write(tmp_path, rows, kind, group=7)))
        found = validate(manifest, JobSpec(manifest="m", output="o", defaults=DEFAULTS), tokenizer=None)
        named = {(issue.row, issue.column): issue.rule for issue in found.errors if "no file" not in issue.rule}
        wanted = {(n, column): rule for n, (_, column, rule) in enumerate(BROKEN)}
        assert named == wanted, kind


def same(found: Any, put: Any) -> bool:
    return str(found) == str(put) if isinstance(put, float) else bool(found == put)


@pytest.mark.parametrize(("change", "column", "rule"), BROKEN, ids=[f"{c}-{n}" for n, (_, c, _) in enumerate(BROKEN)])
def test_a_broken_rule_is_named_and_stops_no_other_row(
    tmp_path: Path, change: dict[str, Any], column: str, rule: str
) -> None:
    good = dict.fromkeys(change) | {"prompt": "a", "row_id": "first"}
    for kind in FORMATS:
        path = write(tmp_path, [good, {**good, "row_id": "bad", **change}, {**good, "row_id": "last"}], kind)
        rows = resolve(path)
        assert [row.request is None for row in rows] == [False, True, False], kind
        (issue,) = rows[1].issues
        assert (issue.file, issue.row, issue.column, issue.rule) == (str(path), 1, column, rule), kind
        assert issue.row_id == change.get("row_id", "bad")
        blank_in_csv = kind == "csv" and change.get(column) is None
        assert blank_in_csv or same(issue.value, change[column]), kind


def test_all_rules_of_a_row_come_at_once_in_the_order_of_the_contract(tmp_path: Path) -> None:
    bad = {**ONE, "prompt": "", "seed": -5, "height": 31, FRAMES: [99], STRENGTHS: [2.0], "row_id": "x"}
    (row,) = resolve(write(tmp_path, [bad], "jsonl"))
    assert [(issue.column, issue.value) for issue in row.issues] == [
        *(("prompt", ""), ("seed", -5), ("height", 31), ("height", 31)),
        *((FRAMES, [99]), (STRENGTHS, [2.0])),
    ]
    assert str(row.issues[1]) == f"{row.file} row 0 (x), seed = -5: must be 0 to 9223372036854775807"


def test_lists_of_one_row_are_not_compared_with_the_next_rows(tmp_path: Path) -> None:
    lists = [[0.5, 0.25], [1.0, 0.5], None, [1.0]]
    for kind in FORMATS:
        rows = resolve(write(tmp_path, [{"prompt": "a", "timesteps": entries} for entries in lists], kind))
        assert [row.request and row.request.timesteps for row in rows] == [
            entries and tuple(entries) for entries in lists
        ]


def test_a_bad_num_frames_is_one_fault_and_not_two(tmp_path: Path) -> None:
    rows = [{"prompt": "a", **ONE, FRAMES: [30], "num_frames": frames} for frames in ("33", "many", "")]
    found = resolve(write(tmp_path, rows, "csv"))
    assert [[issue.column for issue in row.issues] for row in found] == [[], ["num_frames"], [FRAMES]]


LIMITS: list[dict[str, Any]] = [
    {"seed": 0},
    {"seed": 2**63 - 1},
    {"height": 32, "width": 8192},
    {"num_frames": 1, "frame_rate": 1.0},
    {"num_frames": 1025, "frame_rate": 120.0},
    {"num_inference_steps": 1, "guidance_scale": 1.0, "stg_scale": 0.0},
    {"image_cond_noise_scale": 0.0, "decode_timestep": 1.0, "decode_noise_scale": 1.0},
    {"timesteps": [1.0]},
    {**TWO, FRAMES: [0, 16], STRENGTHS: [0.0, 1.0], HASHES: [None, "0" * 64]},
    {PATHS: [], FRAMES: [], STRENGTHS: []},
    {"priority": -(2**31)},
]


@pytest.mark.parametrize("values", LIMITS, ids=[next(iter(values)) for values in LIMITS])
def test_limits_themselves_are_allowed(tmp_path: Path, values: dict[str, Any]) -> None:
    for kind in FORMATS:
        (row,) = resolve(write(tmp_path, [{"prompt": "a", **values}], kind))
        assert row.request is not None, (kind, row.issues)


@pytest.mark.parametrize(
    ("column", "cells", "wrong", "rule"),
    [
        ("seed", ["1", "abc", "2.5", "true", "1e30", "7.0"], [1, 2, 3, 4], "must be a whole number below 2^63"),
        ("frame_rate", ["1", "x", "[8]", "8.5"], [1, 2], "must be a number"),
        (
            FRAMES,
            ["", "0", "[0.5]", '["a"]', "[", '{"a": 1}'],
            [1, 2, 3, 4, 5],
            'must be a list of whole numbers below 2^63, as JSON, e.g. ["a.png"] or [0, 8]',
        ),
        (PATHS, ["", "a.png", "[1]"], [1, 2], 'must be a list of texts, as JSON, e.g. ["a.png"] or [0, 8]'),
        (
            "timesteps",
            ["[1, 0.5]", "0.5", "[true]"],
            [1, 2],
            'must be a list of numbers, as JSON, e.g. ["a.png"] or [0, 8]',
        ),
    ],
)
def test_cells_of_csv_that_do_not_parse(
    tmp_path: Path, column: str, cells: list[str], wrong: list[int], rule: str
) -> None:
    rows = resolve(write(tmp_path, [{"prompt": "a", column: cell} for cell in cells], "csv"))
    assert [row.row for row in rows if row.request is None] == wrong
    for row in wrong:
        assert [(i.column, i.value, i.rule) for i in rows[row].issues] == [(column, cells[row], rule)]


@pytest.mark.parametrize(
    ("column", "good", "bad", "rule"),
    [
        ("prompt", "a", 5, "must be text"),
        ("row_id", "a", 5, "must be text"),
        ("seed", 1, "1", "must be a whole number below 2^63"),
        ("seed", 1, 2**70, "must be a whole number below 2^63"),
        ("height", 64, True, "must be a whole number below 2^63"),
        ("frame_rate", 8, "fast", "must be a number"),
        (FRAMES, [], 0, 'must be a list of whole numbers below 2^63, as JSON, e.g. ["a.png"] or [0, 8]'),
        (PATHS, [], "a.png", 'must be a list of texts, as JSON, e.g. ["a.png"] or [0, 8]'),
    ],
)
def test_values_of_jsonl_of_the_wrong_type(tmp_path: Path, column: str, good: Any, bad: Any, rule: str) -> None:
    rows = resolve(write(tmp_path, [{"prompt": "a", column: good}, {"prompt": "a", column: bad}], "jsonl"))
    assert rows[0].request is not None
    assert [(i.row, i.column, i.value, i.rule) for i in rows[1].issues] == [(1, column, bad, rule)]
    (alone,) = resolve(write(tmp_path, [{"prompt": "a", column: bad}], "jsonl"))
    assert [(i.row, i.column, i.value, i.rule) for i in alone.issues] == [(0, column, bad, rule)]


WRONG_TYPES = [
    ("prompt", pa.int64(), "must be text, is int64"),
    ("prompt", pa.binary(), "must be text, is binary"),
    ("row_id", pa.int32(), "must be text, is int32"),
    ("height", pa.string(), "must be a whole number, is string"),
    ("seed", pa.bool_(), "must be a whole number, is bool"),
    ("frame_rate", pa.timestamp("ms"), "must be a number, is timestamp[ms]"),
    (PATHS, pa.string(), "must be a list of texts, is string"),
    (FRAMES, pa.list_(pa.string()), "must be a list of whole numbers, is list<element: string>"),
    ("timesteps", pa.float64(), "must be a list of numbers, is double"),
]


@pytest.mark.parametrize(("column", "kind", "rule"), WRONG_TYPES, ids=[f"{c}-{k}" for c, k, _ in WRONG_TYPES])
def test_parquet_columns_of_the_wrong_type(tmp_path: Path, column: str, kind: pa.DataType, rule: str) -> None:
    table = pa.table({"prompt": ["a"]} | {column: pa.nulls(1, kind)})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ManifestError) as caught:
        Manifest.open(str(tmp_path / "rows.parquet"))
    assert [(i.row, i.column, i.rule) for i in caught.value.issues] == [(None, column, rule)]


RIGHT_TYPES = [
    ("prompt", pa.array(["x"], pa.large_string()), "x"),
    ("prompt", pa.array(["x"], pa.string_view()), "x"),
    ("prompt", pa.array(["x"]).dictionary_encode(), "x"),
    ("height", pa.array([64], pa.int8()), 64),
    ("height", pa.array([64], pa.uint64()), 64),
    ("height", pa.array([64.0], pa.float32()), 64),
    ("height", pa.array([64]).dictionary_encode(), 64),
    ("frame_rate", pa.array([12], pa.int16()), 12.0),
    ("frame_rate", pa.array([12.5], pa.float16()), 12.5),
    ("seed", pa.nulls(1), DEFAULTS.seed),
    ("timesteps", pa.array([[1.0, 0.5]], pa.large_list(pa.float32())), (1.0, 0.5)),
    ("timesteps", pa.array([[1.0, 0.5]], pa.list_(pa.float64(), 2)), (1.0, 0.5)),
    ("timesteps", pa.array([[1]], pa.list_(pa.int32())), (1.0,)),
]


@pytest.mark.parametrize(("column", "array", "value"), RIGHT_TYPES, ids=[f"{c}-{a.type}" for c, a, _ in RIGHT_TYPES])
def test_parquet_columns_of_any_width_are_taken(tmp_path: Path, column: str, array: pa.Array, value: Any) -> None:
    pq.write_table(pa.table({"prompt": ["a"]} | {column: array}), tmp_path / "rows.parquet")
    (row,) = resolve(tmp_path / "rows.parquet")
    assert row.request is not None, row.issues
    assert getattr(row.request, column) == value
    assert type(getattr(row.request, column)) is type(value)


def test_conditions_in_narrow_types(tmp_path: Path) -> None:
    columns = {
        "prompt": ["a", "b"],
        PATHS: pa.array([["x.png", "y.png"], None], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        FRAMES: pa.array([[0.0, 16.0], None], pa.large_list(pa.float64())),
        STRENGTHS: pa.array([[1.0, 0.5], None], pa.list_(pa.float32(), 2)),
    }
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    first, second = resolve(tmp_path / "rows.parquet")
    assert first.request is not None and second.request is not None, (first.issues, second.issues)
    assert first.request.conditions == (
        Condition(str(tmp_path / "x.png"), start_frame=0, strength=1.0),
        Condition(str(tmp_path / "y.png"), start_frame=16, strength=0.5),
    )
    assert second.request.conditions == ()


def test_whole_numbers_beside_fractions_and_seeds_beyond_63_bits(tmp_path: Path) -> None:
    columns = {"prompt": ["a"] * 3, "height": [64.0, 64.5, None], "seed": pa.array([1, None, 2**64 - 1], pa.uint64())}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    rows = resolve(tmp_path / "rows.parquet")
    found = [(issue.row, issue.column, issue.value, issue.rule) for row in rows for issue in row.issues]
    rule = "must be a whole number below 2^63"
    assert found == [(1, "height", 64.5, rule), (2, "seed", 2**64 - 1, rule)]


def test_a_row_gets_the_defaults_where_it_says_nothing(tmp_path: Path) -> None:
    defaults = RowDefaults(height=64, width=96, num_frames=9, frame_rate=8, guidance_scale=3, timesteps=(1.0, 0.5))
    rows = [{"prompt": "a", "width": 128, "seed": None}, {"prompt": "b", "width": None, "seed": 4}]
    first, second = resolve(write(tmp_path, rows, "parquet"), defaults=defaults)
    common = {"height": 64, "num_frames": 9, "frame_rate": 8.0, "guidance_scale": 3.0, "timesteps": (1.0, 0.5)}
    assert first.request == RenderRequest(prompt="a", width=128, **common)
    assert second.request == RenderRequest(prompt="b", width=96, seed=4, **common)


def test_paths_start_from_the_manifest(tmp_path: Path) -> None:
    paths = ["m/a.png", "../b.png", "/abs/c.png", "s3://bucket/d.png"]
    (row,) = resolve(write(tmp_path, [{"prompt": "a", PATHS: paths, FRAMES: [0, 1, 2, 3]}], "csv"))
    assert row.request is not None
    assert [condition.media for condition in row.request.conditions] == [
        *(f"{tmp_path}/m/a.png", f"{tmp_path.parent}/b.png", "/abs/c.png", "s3://bucket/d.png")
    ]
    assert [condition.strength for condition in row.request.conditions] == [1.0] * 4


def test_hashes_and_priority_are_taken_from_the_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a", **TWO, HASHES: ["0" * 64, None], "priority": 5}, {"prompt": "b", "priority": None}]
    first, second = resolve(write(tmp_path, rows, "jsonl"))
    assert first.request is not None
    assert [condition.media_sha256 for condition in first.request.conditions] == ["0" * 64, None]
    assert (first.priority, second.priority) == (5, 0)


def test_a_seed_comes_from_the_row_then_its_id_then_the_job(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "row_id": i, "seed": s} for i, s in (("x", 3), ("x2", None), (None, 4), (None, None))]
    seeds = [row.request.seed for row in resolve(write(tmp_path, rows, "csv")) if row.request]
    digest = hashlib.sha256(b"x2").hexdigest()
    assert seeds == [3, int(digest[:8], 16), 4, 171198]
    assert seed_of("x2") == seeds[1]


def test_defaults_are_held_against_the_same_rules() -> None:
    assert check_defaults(RowDefaults()) == []
    found = check_defaults(RowDefaults(height=33, num_frames=2000, timesteps=(0.5, 1.0), num_inference_steps=2))
    assert str(ManifestError(found)).splitlines() == [
        "the job file breaks 4 rule(s):",
        f"  the job file, defaults.height = 33: {EVEN}",
        "  the job file, defaults.num_frames = 2000: must be 1 to 1025",
        "  the job file, defaults.num_inference_steps = 2: must be left out beside timesteps, which are the steps",
        "  the job file, defaults.timesteps = (0.5, 1.0): must fall from entry to entry",
    ]


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("promt", "prompt"),
        ("Prompt", "prompt"),
        ("num_frame", "num_frames"),
        ("num-frames", "num_frames"),
        ("heigth", "height"),
        ("conditioning_media_path", PATHS),
        ("fps", "frame_rate"),
        ("steps", "num_inference_steps"),
        ("note", None),
        ("caption", None),
        ("split", None),
    ],
)
def test_names_that_look_like_a_column(name: str, right: str | None) -> None:
    assert nearest_column(name) == right
