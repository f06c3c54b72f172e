"""The one form of a result file: when, on what, with which versions, by which command, and the figures."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

_VERSIONED = ("ltx-batch", "torch", "diffusers", "transformers", "ray", "pyarrow", "imageio-ffmpeg", "bitsandbytes")


def command() -> str:
    """How this process was started, at the repository's root."""
    script = Path(sys.argv[0]).resolve().relative_to(Path(__file__).resolve().parents[1])
    return shlex.join(["python", str(script), *sys.argv[1:]])


def write_result(
    path: Path,
    figures: list[dict[str, Any]],
    *,
    notes: str = "",
    device: str | None = None,
    policy: dict[str, Any] | None = None,
) -> None:
    """Write `path` as JSON. A figure is {"name", "value", "unit"}, with a "bound" where one is promised. `device` is the
    GPU's model, where one worked; `policy` the precision, where one is judged."""
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware() if device is None else f"{device}; {hardware()}",
        "versions": {"python": platform.python_version()} | installed(_VERSIONED),
        "command": command(),
        "notes": notes,
        **({} if policy is None else {"policy": policy}),
        "figures": figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    for figure in figures:
        print(f"{figure['name']:<32} {figure['value']} {figure['unit']}")
    print(f"written to {path}")


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those that are there: a machine that only renders has no Ray."""
    found = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def hardware() -> str:
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{os.cpu_count()} cores, {model.partition(':')[2].strip()}, {memory_bytes / 2**30:.0f} GiB"
