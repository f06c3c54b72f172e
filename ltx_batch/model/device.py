"""The device that a process works on: its name, and how much of its memory is left."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ltx_batch.errors import JobError
from ltx_batch.model.memory import CONTEXT_BYTES, GIB
from ltx_batch.model.placement import Room


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU where there is one. Raises JobError where `cuda` is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise JobError("device cuda is asked for, but torch finds no GPU here; use device: auto, or cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise JobError(f"unknown device {name!r}; what works: auto, cpu, cuda")
    device = torch.device(name)
    # With its number, as torch 2.11 asks for in what it says of a GPU's memory.
    return gpus(device)[0] if device.type == "cuda" else device


def use_threads(count: int) -> None:
    """CPU threads of torch in this process. Pixels hang on it, so a job pins it; the environment is only read once."""
    torch.set_num_threads(count)


def device_name(device: torch.device) -> str:
    """`cpu`, or the GPU's model."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def gpus(device: torch.device) -> list[torch.device]:
    """`device`, and all other GPUs of this process after it."""
    if device.type != "cuda":
        return [device]
    first = torch.cuda.current_device() if device.index is None else device.index
    others = [number for number in range(torch.cuda.device_count()) if number != first]
    return [torch.device("cuda", number) for number in (first, *others)]


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on a GPU, with what torch keeps for itself; None on a CPU.

    The least of what the driver has and what `torch.cuda.set_per_process_memory_fraction` leaves this process.
    """
    if device.type != "cuda":
        return None
    gpu = gpus(device)[0]
    driver_free, total = torch.cuda.mem_get_info(gpu)
    allocated = torch.cuda.memory_allocated(gpu)
    kept = torch.cuda.memory_reserved(gpu) - allocated
    allowed = int(torch.cuda.get_per_process_memory_fraction(gpu) * total) - allocated
    return max(0, min(driver_free + kept, allowed))


def room(device: torch.device, memory_gib: float | None, held: Callable[[torch.device], int] = lambda _: 0) -> Room:
    """What may be used of the device and of this process's other GPUs by parts of which each holds `held` bytes now. On a
    CPU that is `memory_gib`, where it is given."""
    if device.type != "cuda":
        return Room(None if memory_gib is None else int(memory_gib * GIB))
    first, *others = ((free_bytes(gpu) or 0) + held(gpu) for gpu in gpus(device))
    return Room(first, tuple(others))


def limit_memory(device: torch.device, memory_gib: float) -> None:
    """Have this process use no more than `memory_gib` of each of its GPUs, its context included. Raises JobError where
    that is less than a context takes."""
    if device.type != "cuda":
        return
    limit_bytes = int(memory_gib * GIB) - CONTEXT_BYTES
    if limit_bytes <= 0:
        raise JobError(f"device_memory_gib {memory_gib:g} is less than a process takes before it holds anything")
    for gpu in gpus(device):
        total = torch.cuda.get_device_properties(gpu).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), gpu)


def give_back(device: torch.device) -> None:
    """Have the driver get back what torch keeps of memory that nothing uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
