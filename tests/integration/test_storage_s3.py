"""Storage on S3 servers: one that keeps create-only, and one that ignores it."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import FaultyWire, S3Server, rclone_server

from ltx_batch.errors import StorageRefused
from ltx_batch.storage import Storage, expand, fetch_uri, open_uri, read_uri, sha256_uri

RACERS = 16
CONTESTED = [f"race/{n}.json" for n in range(5)]


@pytest.fixture
def storage(s3_server: S3Server) -> Storage:
    return Storage(s3_server.uri())


def test_the_whole_contract(storage: Storage, tmp_path: Path) -> None:
    storage.probe()
    assert storage.list("") == []
    assert storage.create("runs/a/run.json", b"first")
    assert not storage.create("runs/a/run.json", b"second")
    assert storage.read("runs/a/run.json") == b"first"
    storage.replace("runs/a/status.json", b"old")
    storage.replace("runs/a/status.json", b"new")
    assert storage.read("runs/a/status.json") == b"new"
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"video" * 1000)
    storage.upload(clip, "videos/ab/clip.mp4")
    storage.download("videos/ab/clip.mp4", tmp_path / "copy.mp4")
    assert (tmp_path / "copy.mp4").read_bytes() == clip.read_bytes()
    assert storage.list("") == ["runs/a/run.json", "runs/a/status.json", "videos/ab/clip.mp4"]
    assert storage.list("absent") == []
    assert storage.folders("") == ["runs", "videos"]
    assert storage.folders("absent") == []
    assert storage.exists("runs/a/run.json")
    assert not storage.exists("runs/a")
    storage.delete("runs/a/run.json")
    storage.delete("runs/a/run.json")
    assert not storage.exists("runs/a/run.json")
    with pytest.raises(FileNotFoundError, match=r"runs/a/run\.json"):
        storage.read("runs/a/run.json")
    assert storage.create("empty", b"")
    assert not storage.create("empty", b"")
    assert storage.read("empty") == b""


def test_what_others_write_is_seen_at_once(storage: Storage) -> None:
    """No listing may come from a cache. Other options make another connection, as another machine has."""
    other = Storage(storage.uri, options={"default_fill_cache": False})
    storage.create("a/x/1", b"1")
    assert (storage.list("a"), storage.folders("a"), storage.exists("a/y/2")) == (["a/x/1"], ["x"], False)
    other.create("a/y/2", b"2")
    assert (storage.list("a"), storage.folders("a"), storage.exists("a/y/2")) == (["a/x/1", "a/y/2"], ["x", "y"], True)


def test_a_pickled_storage_connects_again(storage: Storage) -> None:
    storage.create("x", b"1")
    assert pickle.loads(pickle.dumps(storage)).read("x") == b"1"


def _create_all(job: tuple[Storage, int]) -> list[bool]:
    storage, writer = job
    return [storage.create(name, b"%d" % writer) for name in CONTESTED]


def check_winners(storage: Storage, won: list[list[bool]]) -> None:
    for name, claims in zip(CONTESTED, zip(*won, strict=True), strict=True):
        assert claims.count(True) == 1
        assert storage.read(name) == b"%d" % claims.index(True)


def test_one_of_many_threads_creates(storage: Storage) -> None:
    with ThreadPoolExecutor(RACERS) as pool:
        check_winners(storage, list(pool.map(_create_all, [(storage, n) for n in range(RACERS)])))


def test_one_of_many_processes_creates_also_after_a_fork(storage: Storage) -> None:
    """The parent is connected when it forks; its children must not use its connections."""
    storage.create("connected", b"")
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        check_winners(storage, list(pool.map(_create_all, [(storage, n) for n in range(4)])))


def test_a_child_needs_only_the_environment(storage: Storage) -> None:
    code = "import sys; from ltx_batch.storage import Storage; print(Storage(sys.argv[1]).create('x', b'from a child'))"
    done = subprocess.run([sys.executable, "-c", code, storage.uri], capture_output=True, check=True)
    assert done.stdout == b"True\n"
    assert storage.read("x") == b"from a child"


def test_a_writer_killed_in_the_middle_of_an_upload_leaves_no_object(s3_server: S3Server, tmp_path: Path) -> None:
    uri = s3_server.uri()
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(bytes(4_000_000))
    code = (
        "import sys; from pathlib import Path; from ltx_batch.storage import Storage; "
        "Storage(sys.argv[1], options={'endpoint_url': sys.argv[2]}).upload(Path(sys.argv[3]), 'videos/clip.mp4')"
    )
    with FaultyWire(s3_server.endpoint, stall_after_bytes=1_000_000) as wire:
        child = subprocess.Popen([sys.executable, "-c", code, uri, wire.endpoint, str(clip)])
        assert wire.stalled.wait(60)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert Storage(uri).list("") == []
    Storage(uri).upload(clip, "videos/clip.mp4")
    assert Storage(uri).read("videos/clip.mp4") == clip.read_bytes()


def test_uris(storage: Storage, tmp_path: Path) -> None:
    for name in ("m/b.csv", "m/a.csv", "m/deep/c.csv", "m/_note.csv"):
        storage.create(name, b"prompt\n" + name.encode())
    refs = expand(f"{storage.uri}/m", suffixes=(".csv",))
    assert [ref.uri for ref in refs] == [f"{storage.uri}/m/a.csv", f"{storage.uri}/m/b.csv"]
    assert expand(f"{storage.uri}/m/*.csv", suffixes=(".csv",)) == refs
    assert expand(refs[0].uri, suffixes=(".csv",)) == refs[:1]
    assert refs[0].size == 14
    with open_uri(refs[0].uri) as file:
        file.seek(7)
        assert file.read() == b"m/a.csv"
    fetch_uri(refs[0].uri, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes() == read_uri(refs[0].uri)
    before = sha256_uri(refs[0])
    assert sha256_uri(refs[0].uri) == before
    storage.replace("m/a.csv", b"prompt\nM/A.CSV")
    assert sha256_uri(refs[0].uri) != before
    with pytest.raises(FileNotFoundError):
        expand(f"{storage.uri}/absent", suffixes=(".csv",))


def test_a_missing_bucket_is_named(s3_server: S3Server) -> None:
    with pytest.raises(StorageRefused, match=r"s3://nobody-made-this: there is no such bucket"):
        Storage("s3://nobody-made-this/out").probe()


def test_no_credentials_says_what_to_set(s3_server: S3Server) -> None:
    code = "from ltx_batch.storage import Storage; Storage('s3://bucket-x/out').probe()"
    bare = {"PATH": "/usr/bin", "HOME": "/nonexistent", "AWS_EC2_METADATA_DISABLED": "true"}
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True)
    assert done.returncode == 1
    assert "StorageRefused: s3://bucket-x: no credentials found; set AWS_ACCESS_KEY_ID" in done.stderr


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rclone_server(tmp_path_factory.mktemp("rclone")) as server:
        yield server


def options(server: S3Server) -> dict[str, str]:
    env = server.environment
    return {"endpoint_url": server.endpoint, "key": env["AWS_ACCESS_KEY_ID"], "secret": env["AWS_SECRET_ACCESS_KEY"]}


def test_a_store_that_ignores_create_only_is_refused(careless: S3Server) -> None:
    storage = Storage(careless.uri(), options=options(careless))
    with pytest.raises(StorageRefused, match="single_writer: true"):
        storage.probe()
    assert storage.list("") == []


def test_a_store_that_ignores_create_only_serves_a_single_writer(careless: S3Server) -> None:
    storage = Storage(careless.uri(), options=options(careless), single_writer=True)
    storage.probe()
    assert storage.create("runs/a/run.json", b"first")
    assert not storage.create("runs/a/run.json", b"second")
    assert storage.read("runs/a/run.json") == b"first"
    assert storage.list("runs") == ["runs/a/run.json"]
