"""What all tests share. Nothing here may need a network, a GPU or a file outside pytest's folders."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # pixels hang on it, and workers have one

import flaky
from servers import S3Server, moto_server


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache of file hashes is the tests' own, for this process and its children."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server for the session. `s3_server.uri()` is a prefix in a fresh bucket; children reach it as we do, through
    AWS_ENDPOINT_URL and the credentials in the environment."""
    with moto_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def flaky_store(monkeypatch: pytest.MonkeyPatch) -> type[flaky.FlakyFileSystem]:
    """A store in memory that fails as scripted, with no wait between tries."""
    monkeypatch.setattr("ltx_batch.storage.connect._FIRST_WAIT_S", 0.0)
    return flaky.install()
