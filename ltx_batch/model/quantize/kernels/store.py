"""Choices on disk: one JSON file a GPU model, which many processes read and add to."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any


def read_choice(path: Path, kernel: str, shape: str) -> dict[str, int] | None:
    """None where nothing is known, or the file cannot be read."""
    chosen = _read(path).get(kernel, {}).get(shape)
    return chosen if isinstance(chosen, dict) else None


def write_choice(path: Path, kernel: str, shape: str, choice: dict[str, int]) -> None:
    """Add one, under a lock, so that no other process's is lost; a disk that takes nothing is no fault."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = _read(path)
            known.setdefault(kernel, {})[shape] = choice
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
            temporary.replace(path)
    except OSError:
        return


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
