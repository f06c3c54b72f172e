"""The device that a process works on: its name, and how much of its memory is left."""

from __future__ import annotations

import torch

from ltx_batch.errors import JobError
from ltx_batch.model.memory import CONTEXT_BYTES, GIB


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one. Raises JobError where `cuda` is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise JobError("device cuda is asked for, but torch finds no GPU here; use device: auto, or cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise JobError(f"unknown device {name!r}; what works: auto, cpu, cuda")
    return torch.device(name)


def use_threads(count: int) -> None:
    """CPU threads of torch in this process. Pixels hang on it, so a job pins it; the environment is only read once."""
    torch.set_num_threads(count)


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on a GPU, with what torch keeps for itself; None on a CPU.

    The least of what the driver has and what `torch.cuda.set_per_process_memory_fraction` leaves this process.
    """
    if device.type != "cuda":
        return None
    driver_free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    kept = torch.cuda.memory_reserved(device) - allocated
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total) - allocated
    return max(0, min(driver_free + kept, allowed))


def limit_memory(device: torch.device, limit_gib: float) -> None:
    """Have this process use no more of a GPU than `limit_gib`, its context included. Raises JobError where that is less
    than a context takes."""
    limit_bytes = int(limit_gib * GIB) - CONTEXT_BYTES
    if limit_bytes <= 0:
        raise JobError(f"device_memory_gib {limit_gib:g} is less than a process takes before it holds anything")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
