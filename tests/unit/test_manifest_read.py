"""Manifests of three formats, read by shard: nothing lost, nothing twice, and what cannot be read is named."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from manifest_files import FORMATS, resolve, write

from ltx_batch.errors import ManifestError
from ltx_batch.manifest import Manifest
from ltx_batch.manifest.sources import TEXT_GROUP_ROWS, suffix

WORDS = ("red", "circle", "über", "円", 'a "quoted" word', "comma, here", "line\nbreak", "tab\tstop", "\\", "'")


def random_rows(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        row: dict[str, Any] = {"prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 6))), "row_id": f"r{number}"}
        row["seed"] = rng.choice([None, 0, rng.randrange(2**62)])
        row["frame_rate"] = rng.choice([None, 8.0, 29.97])
        media = rng.choice([None, [], ["a.png"], ["a.png", "https://host/b c.mp4"]])
        row["conditioning_media_paths"] = media
        row["conditioning_start_frames"] = None if media is None else [rng.randrange(17) for _ in media]
        row["note"] = rng.choice(["x", "multi\nline", "ü,;"])
        rows.append(row)
    return rows


def read_all(manifest: Manifest, shard_rows: int) -> list[dict[str, Any]]:
    return [row for shard in manifest.shards(shard_rows) for row in manifest.read(shard).to_pylist()]


def read_whole(path: Path) -> list[dict[str, Any]]:
    """The file as other libraries read it."""
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: value or None for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shard_rows", [1, 7, 512])
def test_shards_are_the_whole_file(tmp_path: Path, kind: str, shard_rows: int) -> None:
    path = write(tmp_path, random_rows(150, seed=shard_rows), kind, group=40)
    manifest = Manifest.open(str(path))
    assert manifest.rows == 150
    assert read_all(manifest, shard_rows) == read_whole(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_more_rows_than_a_row_group(tmp_path: Path, kind: str) -> None:
    count = 2 * TEXT_GROUP_ROWS + 5
    path = write(tmp_path, random_rows(count, seed=1), kind, group=TEXT_GROUP_ROWS)
    manifest = Manifest.open(str(path))
    shards = list(manifest.shards(5000))
    assert [(shard.row_group, shard.offset, shard.rows) for shard in shards] == [
        *((0, 0, 5000), (0, 5000, TEXT_GROUP_ROWS - 5000)),
        *((1, TEXT_GROUP_ROWS, 5000), (1, TEXT_GROUP_ROWS + 5000, TEXT_GROUP_ROWS - 5000)),
        (2, 2 * TEXT_GROUP_ROWS, 5),
    ]
    assert shards[3].name == "00000-00001-005000"
    whole = read_whole(path)
    for shard in reversed(shards):  # no shard needs those before it
        assert manifest.read(shard).to_pylist() == whole[shard.offset : shard.offset + shard.rows]


def test_the_formats_give_the_same_requests(tmp_path: Path) -> None:
    rows = random_rows(120, seed=3)
    found = {kind: resolve(write(tmp_path, rows, kind)) for kind in FORMATS}
    requests = {kind: [row.request for row in resolved] for kind, resolved in found.items()}
    assert requests["parquet"] == requests["csv"] == requests["jsonl"]
    assert all(request is not None for request in requests["parquet"])
    assert [row.row_id for row in found["csv"]] == [row["row_id"] for row in rows]


@pytest.mark.parametrize("kind", FORMATS)
def test_folder_and_glob_in_order_of_names(tmp_path: Path, kind: str) -> None:
    rows = random_rows(30, seed=4)
    for name, part in (("b", rows[10:20]), ("a", rows[:10]), ("c", rows[20:])):
        write(tmp_path, part, kind, name=name, group=4)
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "readme.txt").write_text("not a manifest")
    for uri in (tmp_path, tmp_path / f"*.{kind}", f"file://{tmp_path}"):
        manifest = Manifest.open(str(uri))
        assert [Path(ref.uri).stem for ref in manifest.files] == ["a", "b", "c"]
        assert [row["row_id"] for row in read_all(manifest, 3)] == [row["row_id"] for row in rows]
    assert [row["row_id"] for row in read_all(Manifest.open(str(tmp_path / f"[ac].{kind}")), 3)] == [
        row["row_id"] for row in rows[:10] + rows[20:]
    ]


def test_rows_count_from_0_in_each_file(tmp_path: Path) -> None:
    write(tmp_path, [{"prompt": "a"}, {"prompt": "b"}], "jsonl", name="one")
    write(tmp_path, [{"prompt": "c"}, {"prompt": None}], "jsonl", name="two")
    rows = resolve(tmp_path)
    assert [(Path(row.file).name, row.row) for row in rows] == [
        *(("one.jsonl", 0), ("one.jsonl", 1)),
        *(("two.jsonl", 0), ("two.jsonl", 1)),
    ]
    assert (rows[3].issues[0].file, rows[3].issues[0].row) == (str(tmp_path / "two.jsonl"), 1)


def test_fingerprint_changes_with_the_bytes_alone(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        write(folder, [{"prompt": "a"}], "csv")
    prints = [Manifest.open(str(folder / "rows.csv")).fingerprint()[0] for folder in (first, second)]
    assert prints[0]["sha256"] == prints[1]["sha256"]
    assert (prints[0]["rows"], prints[0]["size"]) == (1, (first / "rows.csv").stat().st_size)
    (second / "rows.csv").write_text("prompt\nb\n")
    assert Manifest.open(str(second / "rows.csv")).fingerprint()[0]["sha256"] != prints[0]["sha256"]


def test_columns_narrow_what_is_read(tmp_path: Path) -> None:
    for kind in FORMATS:
        manifest = Manifest.open(str(write(tmp_path, random_rows(5, seed=5), kind)))
        shard = next(manifest.shards(5))
        assert manifest.read(shard, columns=("row_id", "absent")).column_names == ["row_id"]
        assert "note" in manifest.read(shard).column_names


def test_other_columns_are_carried_untouched(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "blob": pa.array([b"\x00\xff", None], pa.binary()),
            "nested": [{"k": [1, 2]}, {"k": None}],
            "when": pa.array([0, 1], pa.timestamp("us", tz="UTC")),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    manifest = Manifest.open(str(tmp_path / "rows.parquet"))
    assert manifest.read(next(manifest.shards(512))).equals(table)


def test_jsonl_columns_of_mixed_values_are_carried_as_json_text(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "tag": 1, "meta": {"k": 1}}, {"prompt": "b", "tag": "x", "meta": {"l": [2]}}]
    manifest = Manifest.open(str(write(tmp_path, rows, "jsonl")))
    table = manifest.read(next(manifest.shards(512)))
    assert [json.loads(text) for text in table.column("tag").to_pylist()] == [1, "x"]
    assert [json.loads(text) for text in table.column("meta").to_pylist()] == [{"k": 1}, {"l": [2]}]
    pq.write_table(table, tmp_path / "carried.parquet")
    assert pq.read_table(tmp_path / "carried.parquet").to_pylist() == table.to_pylist()


def test_csv_with_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfprompt,height\r\na,128\r\n\r\n"b\r\nc",\r\n5" disc,64\r\n')
    rows = [row.request for row in resolve(path)]
    assert [(row.prompt, row.height) for row in rows if row] == [("a", 128), ("b\r\nc", 128), ('5" disc', 64)]


def test_jsonl_with_byte_order_mark_and_blank_lines_and_no_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\n  \r\n{"prompt": "b"}')
    assert [row.request.prompt for row in resolve(path) if row.request] == ["a", "b"]


@pytest.mark.parametrize(
    ("kind", "text", "rule"),
    [
        ("jsonl", b'{"prompt": "a"', "the line is not JSON"),
        ("jsonl", b'["a"]', "the line is not a JSON object"),
        ("jsonl", b'{"prompt": "\xff"}', "the line is not JSON: 'utf-8' codec"),
        ("jsonl", b'{"prompt": "a", "ltx_key": 1}', "the line has the key ltx_key"),
        ("csv", b"a,b,c", "the line has 3 cells where the header has 2"),
        ("csv", b"a", "the line has 1 cells where the header has 2"),
        ("csv", b"\xff,1", "the line is not UTF-8"),
        ("csv", b'"a"b,1', "the line is not CSV"),
    ],
)
def test_a_line_that_is_no_row_is_named_and_stops_no_other(tmp_path: Path, kind: str, text: bytes, rule: str) -> None:
    good = {"csv": (b"before,1", b"after,2"), "jsonl": (b'{"prompt": "before"}', b'{"prompt": "after"}')}[kind]
    header = [b"prompt,seed"] if kind == "csv" else []
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(b"\n".join([*header, good[0], text, good[1], b""]))
    rows = resolve(path)
    assert [row.request.prompt if row.request else None for row in rows] == ["before", None, "after"]
    (issue,) = rows[1].issues
    assert (issue.row, issue.column) == (1, None)
    assert issue.rule.startswith(rule)


def test_a_quote_that_is_never_closed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt\na\n"b\nc\n')
    rows = resolve(path)
    assert [row.row for row in rows] == [0, 1]
    assert rows[1].issues[0].rule == "the line is not CSV: unexpected end of data"


def test_the_format_is_the_end_of_the_path() -> None:
    assert suffix("s3://bucket/rows.PARQUET?versionId=1.csv") == "parquet"
    assert suffix("/folder.d/what?.csv") == "csv"


def refused(uri: Path | str) -> list[tuple[str | None, str]]:
    with pytest.raises(ManifestError) as caught:
        Manifest.open(str(uri))
    assert all(issue.row is None for issue in caught.value.issues)
    return [(issue.column, issue.rule) for issue in caught.value.issues]


def test_no_manifest_there(tmp_path: Path) -> None:
    ((_, rule),) = refused(tmp_path / "none.parquet")
    assert rule.startswith("there is no manifest")
    ((_, rule),) = refused(tmp_path)
    assert ".parquet or .csv or .jsonl" in rule


def test_formats_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path, [{"prompt": "a"}], "csv")
    write(tmp_path, [{"prompt": "a"}], "parquet")
    ((_, rule),) = refused(tmp_path)
    assert rule.startswith("mixes csv and parquet files")
    assert Manifest.open(f"{tmp_path}/*.csv").rows == 1


def test_unknown_format(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("a")
    assert refused(tmp_path / "rows.txt") == [(None, "must end in .parquet, .csv, .jsonl; ends in .txt")]


@pytest.mark.parametrize(("kind", "text"), [("csv", "prompt\n"), ("csv", "prompt\n\n"), ("jsonl", ""), ("jsonl", "\n")])
def test_no_rows(tmp_path: Path, kind: str, text: str) -> None:
    (tmp_path / f"rows.{kind}").write_text(text)
    assert refused(tmp_path / f"rows.{kind}") == [(None, "has no rows")]


def test_an_empty_parquet_file_has_no_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "rows.parquet")
    assert refused(tmp_path / "rows.parquet") == [(None, "has no rows")]


def test_every_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1 not really")
    write(tmp_path, [{"prompt": "a"}], "parquet", name="c")
    rules = [rule for _, rule in refused(tmp_path)]
    assert len(rules) == 2
    assert all(rule.startswith("cannot be read") for rule in rules)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_header_rules_come_all_at_once(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, [{"promt": "a", "ltx_key": "k"}], kind)
    assert refused(path) == [
        ("ltx_key", "names that begin with ltx_ are the output's own: rename the column"),
        ("prompt", "the column is missing; it is the only one that must be there; is it 'promt'?"),
    ]


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,seed,seed\na,1,2\n")
    assert refused(tmp_path / "rows.csv") == [("seed", "the column is there twice")]
