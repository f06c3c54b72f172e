"""The ledger on an S3 server, and on one that ignores create-only."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
from servers import ACCESS_KEY, SECRET_KEY, FaultyWire, S3Server, rclone_server

from ltx_batch.ledger import Ledger
from ltx_batch.record import RenderRecord
from ltx_batch.storage import Storage

KEY = hashlib.sha256(b"a request").hexdigest()
RECORD = f"videos/{KEY[:2]}/{KEY}.json"


def video(folder: Path, content: bytes) -> Path:
    path = folder / f"{content.hex()}.mp4"
    path.write_bytes(content)
    return path


def record(attempt_id: str) -> RenderRecord:
    return RenderRecord(key=KEY, status="ok", attempt_id=attempt_id)


def test_a_run_from_start_to_end(s3_server: S3Server, tmp_path: Path) -> None:
    ledger = Ledger(Storage(s3_server.uri()))
    assert ledger.find(KEY) is None
    assert ledger.finished_shards("r") == ledger.attempts("r") == {}
    assert ledger.open_run("r", {"rows": 1}) == ledger.open_run("r", {"rows": 2}) == {"rows": 1}
    assert ledger.add_attempt("r", KEY, {"error": "boom"}) == 1
    done = ledger.commit(record("one"), video(tmp_path, b"pixels"))
    assert ledger.find(KEY) == done
    table = pa.table({"ltx_key": [KEY]})
    assert ledger.write_shard("r", "s", 0, table)
    assert ledger.read_shard("r", "s", 0) == table
    ledger.write_status("r", {"ok": 1})
    assert ledger.read_status("r") == {"ok": 1}
    assert (ledger.runs(), ledger.finished_shards("r"), ledger.attempts("r")) == (["r"], {"s": 0}, {KEY: [1]})


def test_racing_workers_agree_on_one_clip(s3_server: S3Server, tmp_path: Path) -> None:
    ledger = Ledger(Storage(s3_server.uri()))
    clips = [video(tmp_path, b"render %d" % n) for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda n: ledger.commit(record(f"worker-{n}"), clips[n]), range(16)))
    assert [result.reused for result in results].count(False) == 1
    assert len({result.video for result in results}) == 1
    assert ledger.storage.list("") == sorted([results[0].video or "", RECORD])
    assert hashlib.sha256(ledger.storage.read(results[0].video or "")).hexdigest() == results[0].sha256


def test_a_412_on_our_own_record_is_a_success(s3_server: S3Server, tmp_path: Path) -> None:
    """The client library repeats the request whose answer was lost, and finds its own record."""
    uri = s3_server.uri()
    with FaultyWire(s3_server.endpoint, drop_answer_to=b"If-None-Match") as wire:
        ledger = Ledger(Storage(uri, options={"endpoint_url": wire.endpoint}))
        done = ledger.commit(record("one"), video(tmp_path, b"pixels"))
        assert wire.dropped == 1
    assert (done.attempt_id, done.reused) == ("one", False)
    assert Ledger(Storage(uri)).find(KEY) == done
    assert Storage(uri).exists(done.video or "")


_DIES_BEFORE_THE_RECORD = """
import os, sys
from pathlib import Path
from ltx_batch.ledger import Ledger
from ltx_batch.record import RenderRecord
from ltx_batch.storage import Storage
storage = Storage(sys.argv[1])
storage.create = lambda name, data: os._exit(9)
Ledger(storage).commit(RenderRecord(key=sys.argv[2], status="ok"), Path(sys.argv[3]))
"""


def test_a_video_without_its_record_does_not_count(s3_server: S3Server, tmp_path: Path) -> None:
    uri = s3_server.uri()
    dead = subprocess.run([sys.executable, "-c", _DIES_BEFORE_THE_RECORD, uri, KEY, video(tmp_path, b"orphan")])
    assert dead.returncode == 9
    ledger = Ledger(Storage(uri))
    assert len(ledger.storage.list("videos")) == 1
    assert ledger.find(KEY) is None
    assert not ledger.commit(record("next"), video(tmp_path, b"pixels")).reused


def test_a_single_writer_needs_no_create_only(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    with rclone_server(tmp_path / "served") as server:
        options = {"endpoint_url": server.endpoint, "key": ACCESS_KEY, "secret": SECRET_KEY}
        ledger = Ledger(Storage(server.uri(), options=options, single_writer=True))
        first = ledger.commit(record("one"), video(tmp_path, b"first"))
        second = ledger.commit(record("two"), video(tmp_path, b"second"))
        assert (second.video, second.reused) == (first.video, True)
        assert ledger.storage.list("") == sorted([first.video or "", RECORD])
        assert [ledger.add_attempt("r", KEY, {"try": n}) for n in range(2)] == [1, 2]
