"""Admission: which shards are open, what is known of their rows, and which attempt is next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltx_batch.admission import Admission, PreparedShard
from ltx_batch.books import OpenShard
from ltx_batch.job import JobSpec, parse_job
from ltx_batch.ledger import Ledger
from ltx_batch.manifest import Manifest
from ltx_batch.record import RenderRecord
from ltx_batch.storage import Storage
from ltx_batch.tally import Tally

RECIPE = {"precision": "fp32"}


class Place:
    """A manifest of rows that need nothing but a name, and a ledger on disk."""

    def __init__(self, folder: Path, rows: int, **changes: Any) -> None:
        path = folder / "m.parquet"
        pq.write_table(pa.table({"prompt": [f"p{i}" for i in range(rows)], "seed": list(range(rows))}), path)
        self.job: JobSpec = parse_job(
            {"manifest": str(path), "output": str(folder / "out"), "shard_rows": 2, **changes}
        )
        self.manifest = Manifest.open(str(path))
        self.ledger = Ledger(Storage(self.job.output))
        self.tally = Tally("run", rows)

    def admission(self, *, run: str = "run", retry: bool = False, check_media: bool = False) -> Admission:
        admission = Admission(self.job, self.ledger, self.manifest, run, check_media)
        shards = list(self.manifest.shards(self.job.shard_rows))
        self.open = admission.count_finished(shards, self.tally, retry=retry)
        return admission

    def prepare(self, **how: Any) -> list[PreparedShard]:
        return [upcoming.result() for upcoming in self.admission(**how).prepare(RECIPE, {})]

    def finish(self, prepared: PreparedShard, *, run: str = "run", bad: tuple[int, ...] = ()) -> OpenShard:
        """Write the shard's lines, with those rows failed."""
        shard = prepared.shard
        for index, key, _, _ in prepared.wanted:
            status: Any = "failed" if index in bad else "ok"
            shard.settle(index, RenderRecord(key=key, status=status, error_class="E", error="e", video="v", sha256="s"))
        self.ledger.write_shard(run, shard.shard.name, shard.epoch, shard.finished_table())
        return shard


def test_every_shard_of_a_fresh_run_is_open_and_nothing_is_known(tmp_path: Path) -> None:
    place = Place(tmp_path, 5)
    prepared = place.prepare()
    assert [len(each.wanted) for each in prepared] == [2, 2, 1]
    assert not any(each.known or each.settled for each in prepared)
    assert [each.shard.epoch for each in prepared] == [0, 0, 0] and place.open == 3


def test_finished_shards_are_counted_and_stay_closed(tmp_path: Path) -> None:
    place = Place(tmp_path, 4)
    place.finish(place.prepare()[0], bad=(1,))
    rest = place.prepare()
    assert [each.shard.shard.name for each in rest] == ["00000-00000-000002"]
    assert (place.tally.ok, place.tally.failed) == (1, 1)


def test_retry_opens_shards_with_failed_rows_in_the_next_epoch_and_keeps_ok_lines(tmp_path: Path) -> None:
    place = Place(tmp_path, 4)
    first, second = place.prepare()
    place.finish(first, bad=(1,)), place.finish(second)
    (again,) = place.prepare(retry=True)
    assert (again.shard.epoch, again.shard.left, again.reopened) == (1, 1, 0)
    assert [index for index, _, _, _ in again.wanted] == [1]
    assert again.shard.lines[0] == first.shard.lines[0] and again.shard.lines[1] is None
    assert (place.tally.ok, place.tally.failed) == (3, 0), "the failed row counts again when it has ended"


def test_check_media_opens_every_shard_and_closes_those_that_still_hold(tmp_path: Path) -> None:
    place = Place(tmp_path, 4)
    for each in place.prepare():
        place.finish(each)
    again = place.prepare(check_media=True)
    assert [(each.shard.left, each.shard.closed, each.wanted) for each in again] == [(0, True, [])] * 2


def test_a_key_that_changed_reopens_its_line(tmp_path: Path) -> None:
    place = Place(tmp_path, 2)
    place.finish(place.prepare()[0])
    admission = place.admission(check_media=True)
    (upcoming,) = admission.prepare({"precision": "bf16"}, {})
    again = upcoming.result()
    assert (len(again.wanted), again.shard.left, again.reopened) == (2, 2, 2)


def test_broken_rules_settle_a_row_without_a_key(tmp_path: Path) -> None:
    place = Place(tmp_path, 2)
    invalid = {(place.manifest.files[0].uri, 1): "prompt: is bad"}
    (upcoming,) = place.admission().prepare(RECIPE, invalid)
    prepared = upcoming.result()
    ((index, record),) = prepared.settled
    assert (index, record.error_class, record.error, record.attempts, record.key) == (
        1, "InvalidRow", "prompt: is bad", 0, "",
    )  # fmt: skip
    assert [index for index, _, _, _ in prepared.wanted] == [0]


def test_records_of_an_earlier_run_are_known_by_their_shard(tmp_path: Path) -> None:
    place = Place(tmp_path, 4)
    first, second = place.prepare(run="yesterday")
    place.finish(first, run="yesterday", bad=(1,)), place.finish(second, run="yesterday")
    known = [each.known for each in place.prepare(run="today")]
    keys = [key for each in (first, second) for _, key, _, _ in each.wanted]
    assert [sorted(each) for each in known] == [[keys[0]], sorted(keys[2:])], "a failed line is no record"
    assert all(record.ok and record.reused for each in known for record in each.values())


def test_records_without_a_shard_are_found_by_looking(tmp_path: Path) -> None:
    place = Place(tmp_path, 2)
    (prepared,) = place.prepare()
    key = prepared.wanted[1][1]
    video = tmp_path / "v.mp4"
    video.write_bytes(b"frames")
    place.ledger.commit(RenderRecord(key=key, status="ok"), video)
    assert place.prepare()[0].known == {}, "an output that no driver has touched is not looked at"
    place.ledger.write_status("run", {})
    (again,) = place.prepare()
    assert set(again.known) == {key} and again.known[key].reused


@pytest.mark.parametrize(
    ("attempts", "next_attempt"),
    [
        ([], 1),
        ([(0, True)], 2),
        ([(0, True), (0, False)], 2),
        ([(1, True)], 1),
        ([(0, True)] * 2, 3),
        ([(0, True)] * 5, 3),
    ],
)
def test_charged_attempts_of_this_epoch_count_and_one_try_is_left(
    tmp_path: Path, attempts: list[tuple[int, bool]], next_attempt: int
) -> None:
    place = Place(tmp_path, 2)
    for number, (epoch, charged) in enumerate(attempts):
        place.ledger.add_attempt("run", "key", {"epoch": epoch, "charged": charged, "at": number})
    admission = place.admission()
    list(admission.prepare(RECIPE, {}))
    assert admission.attempt_of("key") == next_attempt


def test_shards_are_prepared_one_ahead_and_no_further(tmp_path: Path) -> None:
    place = Place(tmp_path, 8)
    read: list[str] = []
    manifest_read = place.manifest.read

    def noted(shard: Any, **how: Any) -> pa.Table:
        read.append(shard.name)
        return manifest_read(shard, **how)

    place.manifest.read = noted  # type: ignore[method-assign]
    source = place.admission().prepare(RECIPE, {})
    next(source).result()
    next(source).result()
    source.close()
    assert 2 <= len(read) <= 3, "the third is begun, and given up where it has not begun to read"


def test_hashes_of_media_are_remembered_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltx_batch.admission.REMEMBERED", 3)
    place = Place(tmp_path, 12)
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(b"picture %d" % number)
    paths = [[f"{row % 6}.png"] for row in range(12)]
    table = pa.table({"prompt": ["p"] * 12, "conditioning_media_paths": paths, "conditioning_start_frames": [[0]] * 12})
    pq.write_table(table, tmp_path / "m.parquet")
    place.manifest = Manifest.open(str(tmp_path / "m.parquet"))
    admission = place.admission()
    keys = [key for upcoming in admission.prepare(RECIPE, {}) for _, key, _, _ in upcoming.result().wanted]
    assert keys[:6] == keys[6:] and len(set(keys)) == 6
    assert len(admission._sha256) == 3
