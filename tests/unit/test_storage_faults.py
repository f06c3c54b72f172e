"""Storage over a store whose requests fail, whose answers get lost, and whose uploads are cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from flaky import FlakyFileSystem

from ltx_batch.errors import StorageRefused
from ltx_batch.storage import Storage, read_uri

Flaky = type[FlakyFileSystem]


@pytest.fixture
def storage(flaky_store: Flaky) -> Storage:
    return Storage("flaky://bucket/out")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"0123456789")
    return path


def test_passing_faults_are_waited_out(storage: Storage, flaky_store: Flaky) -> None:
    flaky_store.script.update(pipe_file=["reset", "reset"], cat_file=["reset"])
    assert storage.create("x", b"data")
    assert storage.read("x") == b"data"
    assert flaky_store.calls == ["pipe_file"] * 3 + ["cat_file"] * 2


def test_patience_ends(storage: Storage, flaky_store: Flaky) -> None:
    flaky_store.script.update(pipe_file=["reset"] * 50)
    with pytest.raises(ConnectionResetError):
        storage.create("x", b"data")
    assert flaky_store.calls == ["pipe_file"] * 5
    assert not storage.exists("x")


def test_denied_is_not_tried_again(storage: Storage, flaky_store: Flaky) -> None:
    flaky_store.script.update(cat_file=["denied"])
    with pytest.raises(PermissionError, match="flaky://bucket/out/x"):
        storage.read("x")
    assert flaky_store.calls == ["cat_file"]


def test_a_lost_answer_reads_as_taken(storage: Storage, flaky_store: Flaky) -> None:
    """Storage cannot know whose file it is; the ledger can."""
    flaky_store.script.update(pipe_file=["lost"])
    assert not storage.create("x", b"ours")
    assert storage.read("x") == b"ours"


def test_a_cut_upload_is_sent_again(storage: Storage, flaky_store: Flaky, clip: Path) -> None:
    flaky_store.script.update(put_file=["cut", "lost"])
    storage.upload(clip, "video")
    assert storage.read("video") == b"0123456789"
    assert flaky_store.calls.count("put_file") == 3


def test_an_upload_that_is_always_cut_fails(storage: Storage, flaky_store: Flaky, clip: Path) -> None:
    flaky_store.script.update(put_file=["cut"] * 50)
    with pytest.raises(ConnectionError, match="5 of 10 bytes"):
        storage.upload(clip, "video")


def test_a_failed_download_leaves_no_file(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.download("absent", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_probe_says_why_it_may_not_write(storage: Storage, flaky_store: Flaky) -> None:
    flaky_store.script.update(pipe_file=["denied"])
    with pytest.raises(StorageRefused, match="grant"):
        storage.probe()


def test_read_uri_is_as_patient(storage: Storage, flaky_store: Flaky) -> None:
    storage.create("x", b"data")
    flaky_store.script.update(cat_file=["reset", "reset"])
    assert read_uri("flaky://bucket/out/x") == b"data"
