"""sha256 of a file anywhere, remembered in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from ltx_batch.storage.uri import FileRef, Options, is_local_uri, open_uri, read_uri, stat_uri

_SMALL_BYTES = 16 * 2**20
_SETTLED_S = 1.0


def sha256_uri(ref_or_uri: FileRef | str, options: Options = None) -> str:
    """Hex sha256 of the file's bytes. Raises FileNotFoundError.

    Remembered by URI, size and fingerprint. A file without a fingerprint, or one that changed while or just before it was
    read, is hashed again next time: within one tick of the clock two versions may look alike.
    """
    ref = stat_uri(ref_or_uri, options) if isinstance(ref_or_uri, str) else ref_or_uri
    note = _cache_file(ref.uri)
    if ref.fingerprint and (known := _recall(note, ref)):
        return known
    digest = _digest(ref, options)
    if ref.fingerprint and stat_uri(ref.uri, options) == ref and _settled(ref):
        _remember(note, ref, digest)
    return digest


def _digest(ref: FileRef, options: Options) -> str:
    if 0 <= ref.size <= _SMALL_BYTES:  # one request instead of several
        return hashlib.sha256(read_uri(ref.uri, options)).hexdigest()
    with open_uri(ref.uri, options) as file:
        digest = hashlib.sha256()
        while block := file.read(_SMALL_BYTES):
            digest.update(block)
        return digest.hexdigest()


def _settled(ref: FileRef) -> bool:
    if not is_local_uri(ref.uri):
        return True
    changed_ns = max(int(part) for part in ref.fingerprint.split("."))
    return time.time_ns() - changed_ns > _SETTLED_S * 1e9


def _cache_file(uri: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    name = hashlib.sha256(uri.encode()).hexdigest()
    return Path(root).expanduser() / "ltx_batch" / "sha256" / name[:2] / f"{name}.json"


def _recall(note: Path, ref: FileRef) -> str | None:
    try:
        known = json.loads(note.read_bytes())
        same = (known["uri"], known["size"], known["fingerprint"]) == (ref.uri, ref.size, ref.fingerprint)
        return str(known["sha256"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(note: Path, ref: FileRef, digest: str) -> None:
    """A cache that cannot be written is done without."""
    text = json.dumps({"uri": ref.uri, "size": ref.size, "fingerprint": ref.fingerprint, "sha256": digest})
    temporary = note.with_name(f"{note.name}.{uuid4().hex[:12]}.tmp")
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(note)
