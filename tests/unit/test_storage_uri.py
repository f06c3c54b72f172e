"""URIs outside the prefix: what they name, how they join, and hashes that are remembered only while they are true."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from flaky import FlakyFileSystem

from ltx_batch.storage import (
    Storage,
    exists_uri,
    expand,
    fetch_uri,
    is_local_uri,
    is_relative,
    join_uri,
    open_uri,
    read_uri,
    sha256_uri,
    stat_uri,
)
from ltx_batch.storage import hashes as hashes_module

SUFFIXES = (".parquet", ".csv")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.parquet", "a.CSV", "c.txt", "_SUCCESS.csv", ".hidden.csv", "deep/d.csv"):
        path = tmp_path / "manifest" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return tmp_path / "manifest"


def names(refs: list) -> list[str]:
    return [ref.uri.rpartition("/")[2] for ref in refs]


def test_expand_a_folder(folder: Path) -> None:
    found = expand(str(folder), suffixes=SUFFIXES)
    assert names(found) == ["a.CSV", "b.parquet"]
    assert found[1].uri == str(folder / "b.parquet")
    assert found[1].size == len("b.parquet")


def test_expand_a_glob(folder: Path) -> None:
    assert names(expand(f"{folder}/*", suffixes=SUFFIXES)) == ["a.CSV", "b.parquet"]
    assert names(expand(f"{folder}/*/d.*", suffixes=SUFFIXES)) == ["d.csv"]


def test_expand_a_file_of_any_suffix(folder: Path) -> None:
    assert names(expand(str(folder / "c.txt"), suffixes=SUFFIXES)) == ["c.txt"]


def test_expand_a_file_whose_name_looks_like_a_glob(folder: Path) -> None:
    (folder / "take[1].csv").write_text("x")
    assert names(expand(f"{folder}/take[1].csv", suffixes=SUFFIXES)) == ["take[1].csv"]


@pytest.mark.parametrize("missing", ["nothing.csv", "deep/*.parquet", "empty"])
def test_expand_nothing(folder: Path, missing: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"ends in \.parquet or \.csv"):
        expand(f"{folder}/{missing}", suffixes=SUFFIXES)


@pytest.mark.parametrize(
    ("base", "relative", "joined"),
    [
        ("/data/set", "img/a.png", "/data/set/img/a.png"),
        ("/data/set", "../a.png", "/data/a.png"),
        ("/data/set", "/abs/a.png", "/abs/a.png"),
        ("/data/set", "s3://b/a.png", "s3://b/a.png"),
        ("s3://bucket/set", "img/a.png", "s3://bucket/set/img/a.png"),
        ("s3://bucket/set/", "./img/../a.png", "s3://bucket/set/a.png"),
        ("s3://bucket", "a.png", "s3://bucket/a.png"),
        ("https://host/set", "a.png", "https://host/set/a.png"),
    ],
)
def test_join(base: str, relative: str, joined: str) -> None:
    assert join_uri(base, relative) == joined


@pytest.mark.parametrize(
    ("uri", "relative", "local"),
    [
        ("out/demo", True, True),
        ("./x", True, True),
        ("/abs", False, True),
        ("~/x", False, True),
        ("file:///abs", False, True),
        ("s3://b/x", False, False),
        ("hf://datasets/a/b.csv", False, False),
    ],
)
def test_kinds_of_uri(uri: str, relative: bool, local: bool) -> None:
    assert (is_relative(uri), is_local_uri(uri)) == (relative, local)


def test_read_open_fetch_exists(folder: Path, tmp_path: Path) -> None:
    uri = f"file://{folder}/c.txt"
    assert read_uri(uri) == b"c.txt"
    with open_uri(uri) as file:
        file.seek(2)
        assert file.read() == b"txt"
    fetch_uri(uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"c.txt"
    assert exists_uri(uri)
    assert not exists_uri(str(folder))
    assert not exists_uri(f"{uri}.absent")


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    """Python's own web server: no ranges, no listings that fsspec could read."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Quiet(*a, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_plain_web_server_will_do(web: str) -> None:
    options = {"endpoint_url": "http://127.0.0.1:1"}  # meant for the object store of the same job
    assert names(expand(f"{web}/b.parquet", suffixes=SUFFIXES, options=options)) == ["b.parquet"]
    assert read_uri(f"{web}/b.parquet", options) == b"b.parquet"
    with open_uri(f"{web}/b.parquet", options) as file:
        file.seek(2)
        assert file.read() == b"parquet"
    with pytest.raises(FileNotFoundError):
        expand(f"{web}/absent.parquet", suffixes=SUFFIXES)


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The URIs that were really hashed."""
    hashed: list[str] = []
    real = hashes_module._digest

    def counted(ref, options):
        hashed.append(ref.uri)
        return real(ref, options)

    monkeypatch.setattr(hashes_module, "_digest", counted)
    return hashed


def test_a_settled_file_is_hashed_once(folder: Path, digests: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes_module, "_SETTLED_S", 0.0)
    expected = hashlib.sha256(b"c.txt").hexdigest()
    uri = str(folder / "c.txt")
    assert [sha256_uri(uri), sha256_uri(stat_uri(uri)), sha256_uri(uri)] == [expected] * 3
    assert len(digests) == 1


def test_a_changed_file_is_hashed_anew_even_with_its_old_size_and_time(
    folder: Path, digests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes_module, "_SETTLED_S", 0.0)
    path = folder / "c.txt"
    old = path.stat()
    sha256_uri(str(path))
    path.write_bytes(b"other")
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert sha256_uri(str(path)) == hashlib.sha256(b"other").hexdigest()
    assert len(digests) == 2


def test_a_fresh_file_is_not_remembered(folder: Path, digests: list[str]) -> None:
    """Two versions written within one tick of the clock look alike."""
    path = folder / "c.txt"
    path.write_bytes(b"now 1")
    sha256_uri(str(path))
    sha256_uri(str(path))
    assert len(digests) == 2


def test_a_torn_note_is_passed_over(folder: Path, digests: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes_module, "_SETTLED_S", 0.0)
    uri = str(folder / "b.parquet")
    first = sha256_uri(uri)
    hashes_module._cache_file(uri).write_text('{"uri": ')
    assert sha256_uri(uri) == first
    assert len(digests) == 2


def test_no_cache_folder_is_no_fault(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blocked").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    assert sha256_uri(str(folder / "c.txt")) == hashlib.sha256(b"c.txt").hexdigest()


def test_big_remote_files_are_hashed_in_blocks(
    flaky_store: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashes_module, "_SMALL_BYTES", 1000)
    Storage("flaky://bucket").create("weights", data := os.urandom(2500))
    assert sha256_uri("flaky://bucket/weights") == hashlib.sha256(data).hexdigest()
    assert "cat_file" not in flaky_store.calls
