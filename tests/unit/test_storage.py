"""Storage on a local disk: writes that are whole or absent, and create-only writes that one writer wins."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from ltx_batch.errors import StorageRefused
from ltx_batch.storage import Storage

RACERS = 16
CONTESTED = [f"race/{n}.json" for n in range(20)]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "out"))


def leftovers(storage: Storage) -> list[str]:
    return [path.name for path in Path(storage.uri).rglob("*.tmp")]


def test_create_is_create_only(storage: Storage) -> None:
    assert storage.create("a/b/c.json", b"first")
    assert not storage.create("a/b/c.json", b"second")
    assert storage.read("a/b/c.json") == b"first"
    assert leftovers(storage) == []


def test_replace_overwrites(storage: Storage) -> None:
    storage.replace("status.json", b"old and long")
    storage.replace("status.json", b"new")
    assert storage.read("status.json") == b"new"
    assert leftovers(storage) == []


def _create_all(job: tuple[Storage, int]) -> list[bool]:
    storage, writer = job
    return [storage.create(name, b"%d" % writer * 1000) for name in CONTESTED]


def check_winners(storage: Storage, won: list[list[bool]]) -> None:
    """Each name was won once, and holds the winner's bytes."""
    for name, claims in zip(CONTESTED, zip(*won, strict=True), strict=True):
        assert claims.count(True) == 1
        assert storage.read(name) == b"%d" % claims.index(True) * 1000


def test_one_of_many_threads_creates(storage: Storage) -> None:
    with ThreadPoolExecutor(RACERS) as pool:
        won = list(pool.map(_create_all, [(storage, n) for n in range(RACERS)]))
    check_winners(storage, won)


def test_one_of_many_processes_creates(storage: Storage) -> None:
    with ProcessPoolExecutor(RACERS, mp_context=multiprocessing.get_context("fork")) as pool:
        won = list(pool.map(_create_all, [(storage, n) for n in range(RACERS)]))
    check_winners(storage, won)


def test_readers_see_old_or_new_and_never_a_mixture(storage: Storage) -> None:
    versions = {bytes([letter]) * 200_000 for letter in b"ab"}
    storage.replace("file", min(versions))
    with ThreadPoolExecutor(4) as pool:
        writes = [pool.submit(storage.replace, "file", data) for data in sorted(versions) * 10]
        seen = {storage.read("file") for _ in range(100)}
    assert all(write.result() is None for write in writes)
    assert seen <= versions


def test_upload_copies_and_leaves_the_source(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "clip.mp4"
    source.write_bytes(os.urandom(300_000))
    storage.upload(source, "videos/ab/clip.mp4")
    assert storage.read("videos/ab/clip.mp4") == source.read_bytes()
    before = source.read_bytes()
    source.write_bytes(b"scratch is used again")
    assert storage.read("videos/ab/clip.mp4") == before


_STOPS_BEFORE_PUBLISHING = """
import os, sys, time
from pathlib import Path
from ltx_batch.storage import Storage
def stop(file):
    print("written", flush=True)
    time.sleep(600)
os.fsync = stop
{act}
"""


@pytest.mark.parametrize(
    "act",
    ["Storage(sys.argv[1]).upload(Path(sys.argv[2]), 'v/x')", "Storage(sys.argv[1]).create('v/x', b'x' * 1000)"],
    ids=["upload", "create"],
)
def test_a_killed_writer_leaves_nothing_to_be_seen(storage: Storage, tmp_path: Path, act: str) -> None:
    source = tmp_path / "clip.mp4"
    source.write_bytes(b"x" * 1000)
    child = subprocess.Popen(
        [sys.executable, "-c", _STOPS_BEFORE_PUBLISHING.format(act=act), storage.uri, str(source)],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    with child.stdout as out:
        assert out.readline() == b"written\n"
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert len(leftovers(storage)) == 1
    assert not storage.exists("v/x")
    assert storage.list("") == []
    assert storage.create("v/x", b"the next writer")


def test_list_is_flat_sorted_and_by_folder(storage: Storage) -> None:
    for name in ("runs/b/shards/2.0.parquet", "runs/b/shards/1.0.parquet", "runs/b/run.json", "runs/bb/run.json"):
        storage.create(name, b"x")
    assert storage.list("runs/b") == ["runs/b/run.json", "runs/b/shards/1.0.parquet", "runs/b/shards/2.0.parquet"]
    assert storage.list("absent") == []
    assert storage.folders("runs") == ["b", "bb"]
    assert storage.folders("absent") == []


def test_exists_download_delete(storage: Storage, tmp_path: Path) -> None:
    storage.create("a/x", b"data")
    assert storage.exists("a/x")
    assert not storage.exists("a")
    storage.download("a/x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"data"
    storage.delete("a/x")
    storage.delete("a/x")
    assert not storage.exists("a/x")
    with pytest.raises(FileNotFoundError):
        storage.read("a/x")


def test_a_relative_output_is_fixed_when_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("out/demo")
    monkeypatch.chdir("/")
    storage.create("x", b"1")
    assert (tmp_path / "out/demo/x").read_bytes() == b"1"
    assert storage.path("x") == str(tmp_path / "out/demo/x")


def test_file_uris_are_local(tmp_path: Path) -> None:
    storage = Storage(f"file://{tmp_path}/out")
    assert storage.is_local
    storage.create("x", b"1")
    assert (tmp_path / "out/x").exists()


def test_pickles(storage: Storage) -> None:
    storage.create("x", b"1")
    assert pickle.loads(pickle.dumps(storage)).read("x") == b"1"


def test_files_are_as_readable_as_the_umask_says(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "private"
    source.write_bytes(b"x")
    source.chmod(0o600)
    old = os.umask(0o022)
    try:
        storage.upload(source, "video")
        storage.create("record", b"x")
    finally:
        os.umask(old)
    assert {Path(storage.path(name)).stat().st_mode & 0o777 for name in ("video", "record")} == {0o644}


def test_probe_leaves_nothing(storage: Storage) -> None:
    storage.probe()
    assert list(Path(storage.uri).iterdir()) == []


def test_probe_refuses_a_file_where_the_output_should_be(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageRefused, match=r"cannot be used.* give another --output"):
        Storage(str(tmp_path / "out")).probe()


def _no_links(*_: object) -> None:
    raise OSError(1, "Operation not permitted")


def test_a_disk_without_hard_links_is_refused(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    with pytest.raises(StorageRefused, match="single_writer: true"):
        storage.probe()


def test_a_disk_without_hard_links_serves_a_single_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", _no_links)
    storage = Storage(str(tmp_path / "out"), single_writer=True)
    storage.probe()
    assert storage.create("x", b"first")
    assert not storage.create("x", b"second")
    assert storage.read("x") == b"first"


@pytest.mark.parametrize(
    ("uri", "cure"),
    [("gs://bucket/out", r'pip install "ltx-batch\[gcs\]"'), ("az://box/out", r'pip install "ltx-batch\[azure\]"')],
)
def test_a_missing_library_names_its_extra(uri: str, cure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("gcsfs", "adlfs"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(StorageRefused, match=cure):
        Storage(uri).probe()


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(StorageRefused, match=r"foo.*s3://"):
        Storage("foo://bucket/out").probe()
