"""Media of a request, wherever they lie, into memory."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ltx_batch.errors import MediaError
from ltx_batch.media.read import read_media
from ltx_batch.request import Condition
from ltx_batch.storage import fetch_uri


def load_frames(condition: Condition, num_frames: int, options: Mapping[str, Any] | None = None) -> Condition:
    """The condition with uint8 RGB [F, H, W, 3] in place of a path or URI, at most `num_frames` of them, and the hash of
    the file they came from. An array stays as it is. `options` are fsspec options.

    Raises MediaError where the file is missing, unreadable, or not the one that was hashed before.
    """
    if not isinstance(condition.media, str | Path):
        return condition
    source = str(condition.media)
    with tempfile.TemporaryDirectory(prefix="ltx_batch-") as folder:
        copy = Path(folder, Path(source).name)  # hashed and decoded are the same bytes, whatever happens to the source
        try:
            fetch_uri(source, copy, options=options)
        except FileNotFoundError:
            raise MediaError(f"{source} does not exist") from None
        with copy.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if condition.media_sha256 not in (None, digest):
            raise MediaError(
                f"{source} has sha256 {digest}, not {condition.media_sha256}: it changed after it was hashed"
            )
        try:
            frames = read_media(copy, num_frames=num_frames)
        except MediaError as error:
            raise MediaError(str(error).replace(str(copy), source)) from error
    return replace(condition, media=frames, media_sha256=digest)
