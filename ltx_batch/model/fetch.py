"""Where a checkpoint's files are, and how they come to this machine. No torch."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltx_batch.errors import CheckpointError
from ltx_batch.model.pipeline_config import FILE_NAME
from ltx_batch.storage import FileRef, expand, fetch_uri, is_local_uri

# Folders whose files change the picture. Readmes and the like beside them do not count.
COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler", "latent_upsampler")
SCHEDULER_FILE = "scheduler/scheduler_config.json"
_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".yaml")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")


def checkpoint_files(checkpoint: str, options: Mapping[str, Any] | None = None) -> dict[str, FileRef]:
    """The checkpoint's files by their name below it. `checkpoint` is a folder, URI or hub id. Raises CheckpointError."""
    root = checkpoint if _is_remote(checkpoint) else str(local_folder(checkpoint, options))
    found: dict[str, FileRef] = {}
    for place in (*COMPONENTS, FILE_NAME):
        try:
            refs = expand(f"{root.rstrip('/')}/{place}", suffixes=_SUFFIXES, options=options)
        except FileNotFoundError:
            continue
        found |= {place if place == FILE_NAME else f"{place}/{ref.uri.rpartition('/')[2]}": ref for ref in refs}
    if not found:
        raise CheckpointError(f"no checkpoint at {checkpoint}: none of {'/, '.join(COMPONENTS)}/ is there")
    return found


def local_folder(checkpoint: str, options: Mapping[str, Any] | None = None) -> Path:
    """The checkpoint's folder on this machine; URIs and hub ids are downloaded once. Raises CheckpointError."""
    if checkpoint.endswith(".safetensors"):
        raise CheckpointError(
            f"{checkpoint}: single-file checkpoints are not built yet; give a folder in diffusers' layout"
        )
    if _is_remote(checkpoint):
        return _download(checkpoint, options)
    folder = Path(checkpoint.removeprefix("file://")).expanduser()
    if folder.is_dir():
        return folder
    hub = _HUB_ID.fullmatch(checkpoint)
    if hub is None:
        raise CheckpointError(
            f"no checkpoint at {checkpoint}; give demo, a folder, a URI or a hub id such as Lightricks/LTX-Video"
        )
    return _from_hub(hub["repo"], hub["revision"])


def _is_remote(checkpoint: str) -> bool:
    return not is_local_uri(checkpoint)


def _download(uri: str, options: Mapping[str, Any] | None) -> Path:
    """Into the user's cache, in a folder named by what the listing says, so that changed files are another folder."""
    files = checkpoint_files(uri, options)
    mark = repr(sorted((name, ref.size, ref.fingerprint) for name, ref in files.items()))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltx_batch" / "checkpoints"
    target = cache / hashlib.sha256(f"{uri}{mark}".encode()).hexdigest()[:16]
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch, "checkpoint")
        for name, ref in files.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            fetch_uri(ref.uri, made / name, options)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    return target


def _from_hub(repo: str, revision: str | None) -> Path:
    """The hub's files, in its own cache; where it cannot be reached, what that cache holds."""
    from huggingface_hub import snapshot_download

    patterns = [*(f"{name}/*" for name in COMPONENTS), FILE_NAME]
    reasons = []
    for cached_only in (False, True):
        try:
            return Path(
                snapshot_download(
                    repo,
                    revision=revision,
                    allow_patterns=patterns,
                    ignore_patterns=["*.bin"],
                    local_files_only=cached_only,
                )
            )
        except Exception as error:
            reasons.append((str(error).strip() or type(error).__name__).splitlines()[0])
    raise CheckpointError(f"there is no folder {repo}, and the model hub does not give {repo}: {reasons[0]}")
