"""Where a checkpoint's files are, and how they come to this machine. No torch."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from ltx_batch.errors import CheckpointError
from ltx_batch.model.catalog import OFFICIAL, find_official
from ltx_batch.model.hub import HubFile, HubRepo, commit_of, download
from ltx_batch.model.pipeline_config import FILE_NAME
from ltx_batch.storage import FileRef, expand, fetch_uri, is_local_uri, sha256_uri, stat_uri

# Folders whose files change the picture. Readmes and the like beside them do not count.
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler", "latent_upsampler")
UPSAMPLER_FOLDERS = ("latent_upsampler",)
SCHEDULER_FILE = "scheduler/scheduler_config.json"
SINGLE_FILE = "checkpoint.safetensors"  # what a single file is called in listings, whatever its own name
_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".yaml")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+\.safetensors))?")
_TELL_EVERY_S = 10.0
log = logging.getLogger(__name__)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubPlace:
    """A repository of the model hub, or one file of it."""

    repo: str
    revision: str | None = None
    file: str | None = None


def locate(name: str) -> str | HubPlace:
    """`name` as a local path, a URI, or a place at the hub: an official name or file name, `owner/name@revision`,
    `owner/name@revision:path/to/file.safetensors`. What exists here is meant first. Raises CheckpointError."""
    if not is_local_uri(name):
        return name
    path = Path(name.removeprefix("file://")).expanduser()
    official = find_official(name)
    if official is not None and (name in OFFICIAL or not path.exists()):
        return HubPlace(official.repo, file=official.file)
    if path.exists():
        return str(path)
    hub = _HUB_ID.fullmatch(name)
    if hub is None or (hub["file"] is None and name.endswith(".safetensors")):
        close = difflib.get_close_matches(name.removesuffix(".safetensors"), OFFICIAL, n=1)
        raise CheckpointError(
            f"no weights at {name}; give demo, a folder, a .safetensors file, a URI, a hub id such as owner/name@revision "
            f"or owner/name:file.safetensors, or a name of `ltx-batch fetch`"
            + (f" such as {close[0]}" if close else "")
        )
    return HubPlace(hub["repo"], hub["revision"], hub["file"])


def pin(name: str) -> str:
    """`name` with the commit that it means now, where it means a place at the hub; else as it is. Raises CheckpointError."""
    place = locate(name)
    if not isinstance(place, HubPlace):
        return name
    try:
        commit = commit_of(place.repo, place.revision)
    except CheckpointError as error:
        commit = _cached_commit(place, error)
    return f"{place.repo}@{commit}{f':{place.file}' if place.file else ''}"


def checkpoint_files(
    checkpoint: str, options: Mapping[str, Any] | None = None, *, folders: tuple[str, ...] = COMPONENTS
) -> dict[str, FileRef]:
    """The checkpoint's files by their name below it; a single file is SINGLE_FILE. Nothing large is downloaded.

    Raises CheckpointError.
    """
    place = locate(checkpoint)
    if isinstance(place, HubPlace):
        return _hub_files(place, folders)
    if place.endswith(".safetensors"):
        try:
            return {SINGLE_FILE: stat_uri(place, options)}
        except FileNotFoundError:
            raise CheckpointError(f"no weights at {checkpoint}") from None
    found: dict[str, FileRef] = {}
    for part in (*folders, FILE_NAME):
        try:
            refs = expand(f"{place.rstrip('/')}/{part}", suffixes=_SUFFIXES, options=options)
        except FileNotFoundError:
            continue
        found |= {part if part == FILE_NAME else f"{part}/{ref.uri.rpartition('/')[2]}": ref for ref in refs}
    if not found:
        raise CheckpointError(f"no weights at {checkpoint}: none of {'/, '.join(folders)}/ is there")
    return found


def file_hash(ref: FileRef, options: Mapping[str, Any] | None = None) -> str:
    """sha256 of the file. The hub's own serves: its weights are not downloaded for it."""
    known = ref.uri.startswith("hf://") and _SHA256.fullmatch(ref.fingerprint)
    return ref.fingerprint if known else sha256_uri(ref, options)


def local_checkpoint(
    checkpoint: str, options: Mapping[str, Any] | None = None, *, folders: tuple[str, ...] = COMPONENTS
) -> Path:
    """The checkpoint's folder or file on this machine; what lies elsewhere is downloaded once. Raises CheckpointError."""
    place = locate(checkpoint)
    if isinstance(place, HubPlace):
        with _advised(place):
            return download(place.repo, place.revision, file=place.file, folders=folders)
    return Path(place) if is_local_uri(place) else _download(place, options, folders)


def _hub_files(place: HubPlace, folders: tuple[str, ...]) -> dict[str, FileRef]:
    try:
        repo = HubRepo.look_up(place.repo, place.revision)
    except CheckpointError as error:
        with _advised(place):
            return _cached_files(place, folders, error)
    found = {file.name: repo.ref(file.name) for file in hub_files(repo, place, folders)}
    return {SINGLE_FILE: found[place.file]} if place.file else found


def hub_files(repo: HubRepo, place: HubPlace, folders: tuple[str, ...] = COMPONENTS) -> list[HubFile]:
    """Which files of the repository the place means. Raises CheckpointError where it has none of them."""
    if place.file is not None:
        found = [file for file in repo.files.values() if file.name == place.file]
    else:
        found = [file for file in repo.below(folders) if _counts(file.name)]
    if not found:
        missing = place.file or ", ".join(f"{folder}/" for folder in folders)
        raise CheckpointError(f"{place.repo} at {repo.commit} holds none of {missing}")
    return found + [file for file in repo.files.values() if file.name == FILE_NAME and place.file is None]


@contextmanager
def _advised(place: HubPlace) -> Iterator[None]:
    """Where official weights cannot be had, the error says what brings them."""
    try:
        yield
    except CheckpointError as error:
        official = find_official(place.file or "")
        if official is None:
            raise
        advice = f"`ltx-batch fetch {official.name}` brings it while the hub can be reached"
        raise CheckpointError(f"{str(error).rstrip('.')}. {advice}") from None


def _counts(name: str) -> bool:
    """As `expand` has it for folders anywhere else, so that a listing of the hub and one of its cache are equal."""
    return name.lower().endswith(_SUFFIXES) and not name.rpartition("/")[2].startswith((".", "_"))


def _cached_files(place: HubPlace, folders: tuple[str, ...], error: CheckpointError) -> dict[str, FileRef]:
    """Where the hub cannot be reached: what its cache here holds."""
    try:
        found = download(place.repo, place.revision, file=place.file, folders=folders)
    except CheckpointError:
        raise error from None
    return {SINGLE_FILE: stat_uri(str(found))} if place.file else checkpoint_files(str(found), folders=folders)


def _cached_commit(place: HubPlace, error: CheckpointError) -> str:
    """Where the hub cannot be reached: the commit that its cache here holds under that name."""
    try:
        found = download(place.repo, place.revision, file=place.file, folders=COMPONENTS)
    except CheckpointError:
        raise error from None
    return found.parts[found.parts.index("snapshots") + 1]


def _download(uri: str, options: Mapping[str, Any] | None, folders: tuple[str, ...]) -> Path:
    """Into the user's cache, in a folder named by what the listing says, so that changed files are another folder. The
    processes of a machine bring one copy: the first brings it, and the others wait for it."""
    files = checkpoint_files(uri, options, folders=folders)
    mark = repr(sorted((name, ref.size, ref.fingerprint) for name, ref in files.items()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltx_batch" / "checkpoints"
    target = cache / hashlib.sha256(f"{uri}{mark}".encode()).hexdigest()[:16]
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(target, uri) as locked:
            if not target.is_dir():  # else another process has brought it meanwhile
                _bring(uri, files, target, options, locked=locked)
    return target / SINGLE_FILE if SINGLE_FILE in files else target


def _bring(
    uri: str, files: Mapping[str, FileRef], target: Path, options: Mapping[str, Any] | None, *, locked: bool
) -> None:
    """`target` appears whole. What a process that was killed left of it is used: each file comes whole or not at all."""
    made = target.with_name(f"{target.name}.part" if locked else f"{target.name}.{uuid4().hex[:8]}.part")
    missing = {name: ref for name, ref in files.items() if not (made / name).is_file()}
    needed_bytes = sum(max(ref.size, 0) for ref in missing.values())
    check_space(target.parent, needed_bytes, uri)
    with _told(uri, made, needed_bytes):
        for name, ref in missing.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            fetch_uri(ref.uri, made / name, options)
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster, on a disk without locks
            raise
        shutil.rmtree(made)


@contextmanager
def _alone(target: Path, what: str) -> Iterator[bool]:
    """Within it, no other process of this machine brings `target`. False: the disk knows no locks, and keeps nobody out."""
    folder = target.parents[1] / "locks"
    folder.mkdir(exist_ok=True)
    handle = os.open(
        folder / f"{target.name}.lock", os.O_RDWR | os.O_CREAT
    )  # the lock ends with the process, the file stays
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s: another process brings it; this one waits", what)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(handle)


@contextmanager
def _told(what: str, folder: Path, needed_bytes: int) -> Iterator[None]:
    """Say in the log how far a download is. As warnings, since no less is shown where nothing is set up to show it, and
    28 GB without a word look like a hang."""

    def held_bytes() -> int:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

    def tell() -> None:
        while not ended.wait(_TELL_EVERY_S):
            with suppress(OSError):  # a file that is renamed just now
                log.warning("%s: %.2f of %.2f GB", what, (held_bytes() - before_bytes) / 1e9, needed_bytes / 1e9)

    ended, before_bytes, started_s = threading.Event(), held_bytes(), time.monotonic()
    teller = threading.Thread(target=tell, daemon=True)
    log.warning("%s: bringing %.2f GB to %s", what, needed_bytes / 1e9, folder.parent)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
    log.warning("%s: brought in %.0f s", what, time.monotonic() - started_s)


def check_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises CheckpointError where the disk of `folder` has no room."""
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise CheckpointError(
            f"{what} takes {needed_bytes / 1e9:.1f} GB and {folder} has {free_bytes / 1e9:.1f} GB free; make room, or set "
            "HF_HOME or XDG_CACHE_HOME to another disk"
        )
