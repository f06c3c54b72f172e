"""Where the model lies. Only `resident` is built: everything stays on one device."""

from __future__ import annotations

import torch

from ltx_batch.errors import JobError


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
