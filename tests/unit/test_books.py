"""Books: who waits for which key, and the table of a finished shard."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest

from ltx_batch.books import Books, OpenShard, line, record_of_line
from ltx_batch.manifest import Row, Shard
from ltx_batch.record import RenderRecord

OK = RenderRecord(
    key="k",
    status="ok",
    video="videos/k/k.mp4",
    sha256="ab",
    video_bytes=9,
    frames_sha256="cd",
    seed=7,
    attempts=2,
    timings={"render": 1.5, "encode": 0.1},
    gpu_seconds=1.5,
    worker="host:1",
    device="cpu",
    finished_at="2026-01-01T00:00:00+00:00",
)
FAILED = RenderRecord(key="k", status="failed", attempts=3, error_class="ValueError", error="bad")


def open_shard(rows: int, *, offset: int = 0, name: str = "s") -> OpenShard:
    table = pa.table({"prompt": [f"p{i}" for i in range(rows)], "mine": pa.array(range(rows), pa.int8())})
    listed = [Row("m.parquet", offset + i, None, None) for i in range(rows)]
    return OpenShard(Shard(name, 0, offset, rows, 0), 0, table, listed)


def test_the_first_row_of_a_key_renders_and_its_twins_wait() -> None:
    books, shard = Books(), open_shard(3)
    assert [books.expect(key, shard, index) for index, key in enumerate("aba")] == [True, True, False]
    assert len(books) == 2


def test_a_record_settles_every_row_of_its_key_in_every_shard() -> None:
    books, one, two = Books(), open_shard(2), open_shard(1, name="t")
    for shard, index in ((one, 0), (one, 1), (two, 0)):
        books.expect("k", shard, index)
    settled = books.settle(OK)
    assert [(shard.shard.name, own.reused) for shard, own in settled] == [("s", False), ("s", True), ("t", True)]
    assert (one.left, two.left, len(books)) == (0, 0, 0)


def test_a_failed_row_fails_its_twins_and_none_of_them_reuses_anything() -> None:
    books, shard = Books(), open_shard(2)
    books.expect("k", shard, 0), books.expect("k", shard, 1)
    assert [own.reused for _, own in books.settle(FAILED)] == [False, False]


def test_a_key_that_is_settled_may_be_waited_for_again() -> None:
    books, shard = Books(), open_shard(2)
    books.expect("k", shard, 0)
    books.settle(OK)
    assert books.expect("k", shard, 1), "a later twin asks anew"


def test_a_row_has_one_terminal_line() -> None:
    shard = open_shard(1)
    shard.settle(0, OK)
    with pytest.raises(AssertionError, match="one terminal line"):
        shard.settle(0, FAILED)


def test_kept_lines_are_not_left_to_do() -> None:
    shard = open_shard(3)
    kept = OpenShard(shard.shard, 1, shard.table, shard.rows, [line(0, OK), None, line(2, OK)])
    assert (shard.left, kept.left) == (3, 1)


def test_the_table_is_the_manifests_columns_and_then_ours() -> None:
    shard = open_shard(2, offset=10)
    shard.settle(1, replace(FAILED, key=""))
    shard.settle(0, OK)
    table = shard.finished_table()
    assert table.column_names[:3] == ["prompt", "mine", "ltx_row"] and table.schema.field("mine").type == pa.int8()
    first, second = table.to_pylist()
    assert (first["ltx_row"], first["ltx_status"], first["ltx_video"], first["ltx_render_seconds"]) == (
        10, "ok", "videos/k/k.mp4", 1.5,
    )  # fmt: skip
    assert (second["ltx_row"], second["ltx_key"], second["ltx_error"], second["ltx_video"]) == (11, None, "bad", None)


def test_columns_have_their_types_also_where_all_is_null() -> None:
    shard = open_shard(1)
    shard.settle(0, FAILED)
    schema = shard.finished_table().schema
    assert schema.field("ltx_video").type == pa.string() and schema.field("ltx_render_seconds").type == pa.float64()


def test_a_line_tells_the_record_again_as_reused() -> None:
    again = record_of_line(line(4, OK))
    assert again == replace(OK, reused=True, timings={"render": 1.5})
    assert line(4, again) == {**line(4, OK), "ltx_reused": True}
