"""The GPUs of this machine, asked of the driver's own tool: no torch, no context."""

from __future__ import annotations

import subprocess

_TIMEOUT_S = 10.0


def free_bytes() -> tuple[int, ...]:
    """Of each GPU; empty where there is none, or no tool to ask."""
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S).stdout
        return tuple(int(line) * 2**20 for line in told.splitlines() if line.strip())
    except (OSError, ValueError, subprocess.SubprocessError):
        return ()
