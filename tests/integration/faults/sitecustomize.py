"""Kills its own process at one exact moment of the output's life, where LTX_BATCH_FAULT says so. See `job_runs.Fault`.

Python imports this module at its start when the folder is on PYTHONPATH: so it reaches drivers and Ray's workers alike.
"""

from __future__ import annotations

import json
import os
import re
import signal
from typing import Any

FAULT = json.loads(os.environ.get("LTX_BATCH_FAULT", "null"))


def install(fault: dict[str, Any]) -> None:
    from ltx_batch.storage import Storage

    method, seen = getattr(Storage, fault["operation"]), []

    def faulty(storage: Storage, *arguments: Any) -> Any:
        name = arguments[1] if fault["operation"] == "upload" else arguments[0]
        if re.search(fault["name"], name):
            seen.append(name)
        due = bool(seen) and seen[-1] == name and len(seen) == fault["nth"]
        if due and fault["when"] == "before":
            die(fault["marker"])
        answer = method(storage, *arguments)
        if due:
            die(fault["marker"])
        return answer

    setattr(Storage, fault["operation"], faulty)


def die(marker: str) -> None:
    """SIGKILL, for the first process that gets here."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


if FAULT is not None:
    install(FAULT)
