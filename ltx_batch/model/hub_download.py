"""One large file from the model hub into the hub's own cache: resumed where it broke off, and checked. No torch.

huggingface_hub throws away what it has when a process ends; with files of 28 GB that is a night.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from ltx_batch.errors import CheckpointError
from ltx_batch.model.hub import HubFile, HubRepo, first_line
from ltx_batch.storage import sha256_uri

_TRIES = 5  # in a row that bring nothing
_WAIT_S = 0.25  # before the next try; four times as long each time
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504}
Told = Callable[[int], None]  # so many bytes more; fewer than none where a server makes us begin again


def cache_folder() -> Path:
    """Where the hub's cache is or will be."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def missing_bytes(repo: HubRepo, file: HubFile) -> int:
    """What is still to be downloaded of a file."""
    if repo.cached(file.name) is not None:
        return 0
    part = _part(repo, file)
    return file.size - (part.stat().st_size if part.is_file() else 0)


def fetch_file(repo: HubRepo, file: HubFile, told: Told) -> Path:
    """The file in the cache. Raises CheckpointError where it cannot be had, or has another sha256 than the hub says."""
    from huggingface_hub import hf_hub_download

    path = repo.cached(file.name)
    if path is not None:
        return _checked(path, file)
    if file.sha256 is not None:
        _bring_blob(repo, file, told)
    try:
        # By the revision as asked for, under whose name the cache then finds it without the hub.
        path = Path(hf_hub_download(repo.name, file.name, revision=repo.revision))
    except Exception as error:
        raise CheckpointError(f"the model hub does not give {repo.name}:{file.name}: {first_line(error)}") from error
    if path != repo.cached(file.name):
        raise CheckpointError(f"{repo.name} changed while it was fetched: fetch it again")
    if file.sha256 is None:
        told(file.size)
    return path


def _checked(path: Path, file: HubFile) -> Path:
    """A file that lay in the cache before."""
    if file.sha256 is not None and sha256_uri(str(path)) != file.sha256:
        raise CheckpointError(f"{path} is not what the hub has: remove it and {path.resolve()}, and fetch it again")
    return path


def _bring_blob(repo: HubRepo, file: HubFile, told: Told) -> None:
    """Into the cache's blobs/, which go by the sha256; hf_hub_download then finds it there."""
    part = _part(repo, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as target:
        try:
            fcntl.flock(target, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is fetching {repo.name}:{file.name}; wait for it") from None
        _bring(repo, file, target, told)
    found = _sha256(part)
    if found != file.sha256:
        part.unlink()
        raise CheckpointError(
            f"{repo.name}:{file.name} arrived with sha256 {found}, and the hub says {file.sha256}: what came was thrown away; "
            "fetch it again"
        )
    part.rename(part.with_name(str(file.sha256)))


def _bring(repo: HubRepo, file: HubFile, target: IO[bytes], told: Told) -> None:
    tries = 0
    while target.tell() < file.size:
        before = target.tell()
        try:
            _stream(repo, file, target, told)
        except Exception as error:
            tries = 1 if target.tell() > before else tries + 1
            if tries == _TRIES or not _passes(error):
                raise CheckpointError(
                    f"{repo.name}:{file.name} broke off at {target.tell()} of {file.size} bytes: {first_line(error)}; the same "
                    "command goes on from there"
                ) from error
            time.sleep(_WAIT_S * 4 ** (tries - 1))


def _stream(repo: HubRepo, file: HubFile, target: IO[bytes], told: Told) -> None:
    """From where `target` ends to the end of the file, or to the next fault."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    start = target.tell()
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    url = hf_hub_url(repo.name, file.name, revision=repo.commit)
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as answer:
        hf_raise_for_status(answer)
        if start and answer.status_code != 206:  # a server that cannot give ranges
            target.truncate(0)
            target.seek(0)
            told(-start)
        for piece in answer.iter_bytes():  # as they arrive: what is collected first is lost when the line breaks
            target.write(piece)
            told(len(piece))
    target.flush()


def _passes(error: Exception) -> bool:
    """Whether another try may help: not where the disk is full, or the hub said no."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return False
    return status is None or status in _TRANSIENT_STATUS


def _part(repo: HubRepo, file: HubFile) -> Path:
    folder = cache_folder() / f"models--{repo.name.replace('/', '--')}" / "blobs"
    return folder / f"{file.sha256}.part"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
