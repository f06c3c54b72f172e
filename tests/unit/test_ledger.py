"""The ledger: its layout, and a commit that survives races, lost answers and torn records."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from flaky import FlakyFileSystem

from ltx_batch.ledger import Ledger
from ltx_batch.record import RenderRecord
from ltx_batch.storage import Storage

KEY = hashlib.sha256(b"a request").hexdigest()
RECORD = f"videos/{KEY[:2]}/{KEY}.json"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(Storage(str(tmp_path / "out")))


def video(folder: Path, content: bytes) -> Path:
    path = folder / f"{content.hex()}.mp4"
    path.write_bytes(content)
    return path


def record(attempt_id: str | None = None, key: str = KEY) -> RenderRecord:
    return RenderRecord(key=key, status="ok", num_frames=9, attempt_id=attempt_id, worker=attempt_id)


def test_a_commit_is_laid_out_as_promised(ledger: Ledger, tmp_path: Path) -> None:
    done = ledger.commit(record("one"), video(tmp_path, b"pixels"))
    sha256 = hashlib.sha256(b"pixels").hexdigest()
    assert (done.sha256, done.video_bytes, done.reused) == (sha256, 6, False)
    assert done.video == f"videos/{KEY[:2]}/{KEY}.{sha256[:12]}.mp4"
    assert ledger.storage.list("") == sorted([done.video, RECORD])
    assert ledger.storage.read(done.video) == b"pixels"
    assert ledger.find(KEY) == done


def test_find_nothing(ledger: Ledger) -> None:
    assert ledger.find(KEY) is None


def test_a_commit_without_a_name_gets_one(ledger: Ledger, tmp_path: Path) -> None:
    clip = video(tmp_path, b"pixels")
    names = {ledger.commit(record(key=hashlib.sha256(bytes([n])).hexdigest()), clip).attempt_id for n in range(3)}
    assert len(names) == 3
    assert None not in names


def test_the_loser_of_a_race_takes_the_winners_and_removes_its_own(ledger: Ledger, tmp_path: Path) -> None:
    winner = ledger.commit(record("one"), video(tmp_path, b"first"))
    loser = ledger.commit(record("two"), video(tmp_path, b"second"))
    assert (loser.attempt_id, loser.video, loser.reused) == ("one", winner.video, True)
    assert ledger.storage.list("") == sorted([winner.video or "", RECORD])
    assert ledger.find(KEY) == winner


def test_a_loser_with_the_same_bytes_removes_nothing(ledger: Ledger, tmp_path: Path) -> None:
    winner = ledger.commit(record("one"), video(tmp_path, b"same"))
    loser = ledger.commit(record("two"), video(tmp_path, b"same"))
    assert loser.reused
    assert ledger.storage.read(winner.video or "") == b"same"


def _commit(job: tuple[Ledger, Path, str]) -> RenderRecord:
    ledger, clip, name = job
    return ledger.commit(record(name), clip)


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_one_of_many_racing_workers_wins_and_all_agree(ledger: Ledger, tmp_path: Path, kind: str) -> None:
    jobs = [(ledger, video(tmp_path, b"render %d" % n), f"worker-{n}") for n in range(16)]
    fork = multiprocessing.get_context("fork")
    with ThreadPoolExecutor(16) if kind == "threads" else ProcessPoolExecutor(16, mp_context=fork) as pool:
        results = list(pool.map(_commit, jobs))
    assert [result.reused for result in results].count(False) == 1
    assert len({(result.attempt_id, result.video, result.sha256) for result in results}) == 1
    standing = ledger.find(KEY)
    assert standing is not None and standing.video is not None
    assert ledger.storage.list("") == sorted([standing.video, RECORD])
    assert hashlib.sha256(ledger.storage.read(standing.video)).hexdigest() == standing.sha256


@pytest.mark.parametrize(
    "torn",
    [b"", b'{"key": "', b"[]", b"\xff\xfe", b'{"key": "another", "status": "ok"}'],
    ids=["empty", "cut", "foreign", "binary", "another-key"],
)
def test_a_torn_record_does_not_count_and_is_replaced(ledger: Ledger, tmp_path: Path, torn: bytes) -> None:
    ledger.storage.create(RECORD, torn)
    assert ledger.find(KEY) is None
    done = ledger.commit(record("one"), video(tmp_path, b"pixels"))
    assert not done.reused
    assert ledger.find(KEY) == done


def test_a_failed_record_does_not_count(ledger: Ledger) -> None:
    ledger.storage.create(RECORD, RenderRecord(key=KEY, status="failed").to_json())
    assert ledger.find(KEY) is None


def test_a_video_that_is_not_there_is_not_committed(ledger: Ledger, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ledger.commit(record("one"), tmp_path / "absent.mp4")
    assert ledger.storage.list("") == []


@pytest.mark.parametrize("faults", [["lost"], ["reset", "lost"], ["lost", "reset"]])
def test_a_lost_answer_to_our_own_record_is_a_success(
    flaky_store: type[FlakyFileSystem], tmp_path: Path, faults: list[str]
) -> None:
    """The store says "exists" to the second try of a request that had succeeded."""
    ledger = Ledger(Storage("flaky://bucket/out"))
    flaky_store.script["pipe_file"] = faults
    done = ledger.commit(record("one"), video(tmp_path, b"pixels"))
    assert (done.attempt_id, done.reused) == ("one", False)
    assert ledger.storage.read(done.video or "") == b"pixels"
    assert ledger.find(KEY) == done


def test_a_cut_upload_is_never_committed(flaky_store: type[FlakyFileSystem], tmp_path: Path) -> None:
    ledger = Ledger(Storage("flaky://bucket/out"))
    flaky_store.script["put_file"] = ["cut"] * 50
    with pytest.raises(ConnectionError):
        ledger.commit(record("one"), video(tmp_path, b"pixels"))
    assert ledger.find(KEY) is None


def test_a_lost_answer_does_not_charge_a_row_twice(flaky_store: type[FlakyFileSystem]) -> None:
    ledger = Ledger(Storage("flaky://bucket/out"))
    flaky_store.script["pipe_file"] = ["ok", "lost"]
    assert ledger.add_attempt("run", KEY, {"worker": "a", "error": "boom"}) == 1
    assert ledger.add_attempt("run", KEY, {"worker": "b", "error": "boom"}) == 2
    assert ledger.attempts("run") == {KEY: [1, 2]}


def test_the_first_description_of_a_run_stands(ledger: Ledger) -> None:
    assert ledger.read_run("r1") is None
    assert ledger.open_run("r1", {"rows": 3}) == {"rows": 3}
    assert ledger.open_run("r1", {"rows": 4}) == {"rows": 3}
    assert ledger.read_run("r1") == {"rows": 3}
    ledger.open_run("r0", {})
    assert ledger.runs() == ["r0", "r1"]


def test_shards_and_their_epochs(ledger: Ledger) -> None:
    table = pa.table({"prompt": ["a", "b"], "ltx_status": ["ok", "failed"]})
    again = pa.table({"prompt": ["a", "b"], "ltx_status": ["ok", "ok"]})
    assert ledger.finished_shards("r") == {}
    assert ledger.write_shard("r", "000-000001", 0, table)
    assert not ledger.write_shard("r", "000-000001", 0, again)
    assert ledger.write_shard("r", "000-000001", 10, again)
    assert ledger.write_shard("r", "000-000001", 9, again)
    assert ledger.write_shard("r", "part.1", 0, table)
    assert ledger.finished_shards("r") == {"000-000001": 10, "part.1": 0}
    assert ledger.read_shard("r", "000-000001", 0) == table
    assert ledger.read_shard("r", "000-000001", 10, columns=["ltx_status"]).to_pydict() == {"ltx_status": ["ok", "ok"]}
    with pytest.raises(FileNotFoundError):
        ledger.read_shard("r", "000-000001", 3)


def test_racing_drivers_finish_a_shard_once(ledger: Ledger) -> None:
    tables = [pa.table({"ltx_worker": [f"driver-{n}"]}) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda table: ledger.write_shard("r", "s", 0, table), tables))
    assert won.count(True) == 1
    assert ledger.read_shard("r", "s", 0) == tables[won.index(True)]


def test_attempts_are_numbered_without_gaps_by_racing_writers(ledger: Ledger) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda n: ledger.add_attempt("r", KEY, {"try": n}), range(8)))
    assert sorted(numbers) == list(range(1, 9))
    assert ledger.attempts("r") == {KEY: list(range(1, 9))}
    for n, number in enumerate(numbers):
        assert ledger.read_attempt("r", KEY, number) == {"try": n}


def test_status_is_replaced(ledger: Ledger) -> None:
    assert ledger.read_status("r") is None
    ledger.write_status("r", {"ok": 1})
    ledger.write_status("r", {"ok": 2})
    assert ledger.read_status("r") == {"ok": 2}


def test_pickles(ledger: Ledger, tmp_path: Path) -> None:
    done = ledger.commit(record("one"), video(tmp_path, b"pixels"))
    assert pickle.loads(pickle.dumps(ledger)).find(KEY) == done
