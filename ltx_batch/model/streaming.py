"""Weights from files into a module, piece by piece: no file is ever held whole beside them, and none is mapped.

Libraries map a file and cast it tensor by tensor, and the mapped pages stay beside the cast ones to the end: three times
the weights for fp32 on disk and bf16 in memory. Here the host holds the weights that stay there and one piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import IO

import torch
from torch import nn

from ltx_batch.errors import CheckpointError
from ltx_batch.tensor_file import ITEM_BYTES, StoredTensor

_PIECE_BYTES = 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def fill(module: nn.Module, tensors: Mapping[str, StoredTensor], dtype: torch.dtype, device: torch.device) -> None:
    """Give a module that was built on the meta device its weights, cast to `dtype`, on `device`.

    A layer's attribute STORED names those that have a type of their own. `tensors` are those that `check_tensors` let pass,
    or some of them: the rest stays as it is. Raises CheckpointError where a file has shrunk since its header was read.
    """
    homes = module.state_dict(keep_vars=True)
    piece = torch.empty(_PIECE_BYTES, dtype=torch.uint8)
    filled: dict[int, torch.Tensor] = {}
    ordered = sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start))
    for file, entries in groupby(ordered, key=lambda item: item[1].file):
        with Path(file).open("rb", buffering=0) as stream:
            for name, stored in entries:
                if id(homes[name]) not in filled:
                    owner, _, leaf = name.rpartition(".")
                    own = getattr(module.get_submodule(owner), "STORED", {}).get(leaf, dtype)
                    weight = _read(stream, stored, own, device, piece)
                    trainable = isinstance(homes[name], nn.Parameter)
                    filled[id(homes[name])] = nn.Parameter(weight, requires_grad=False) if trainable else weight
    for name, home in homes.items():
        if id(home) in filled:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, filled[id(home)])


def check_tensors(module: nn.Module, tensors: Mapping[str, StoredTensor], source: str) -> None:
    """`tensors` go by the module's own names; of tied weights one name is enough.

    Raises CheckpointError where tensors are missing, too many or of another shape.
    """
    homes = module.state_dict(keep_vars=True)
    given = {id(homes[name]) for name in tensors if name in homes}
    missing = [name for name, home in homes.items() if id(home) not in given]
    foreign = [name for name in tensors if name not in homes]
    shapes = [
        f"{name} {list(tensor.shape)} in place of {list(homes[name].shape)}"
        for name, tensor in tensors.items()
        if name in homes and tuple(homes[name].shape) != tensor.shape
    ]
    for what, names in (
        ("lacks", missing),
        ("has tensors that its config knows nothing of:", foreign),
        ("has other shapes than its config says:", shapes),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{source} {what} {', '.join(sorted(names)[:3])}{more}; weights and config are not of one model"
            )


def _read(
    stream: IO[bytes], stored: StoredTensor, dtype: torch.dtype, device: torch.device, piece: torch.Tensor
) -> torch.Tensor:
    weight = torch.empty(stored.shape, dtype=dtype, device=device)
    flat = weight.view(-1)
    stream.seek(stored.start)
    if device.type == "cpu" and _DTYPES[stored.dtype] == dtype:
        _read_bytes(stream, flat.view(torch.uint8), stored)
        return weight
    item_bytes = ITEM_BYTES[stored.dtype]
    for part in flat.split(_PIECE_BYTES // item_bytes):
        held = piece[: part.numel() * item_bytes]
        _read_bytes(stream, held, stored)
        part.copy_(held.view(_DTYPES[stored.dtype]))
    return weight


def _read_bytes(stream: IO[bytes], target: torch.Tensor, stored: StoredTensor) -> None:
    view = memoryview(target.numpy())  # type: ignore[arg-type] # an array is a buffer
    while view:
        count = stream.readinto(view)  # type: ignore[attr-defined] # at most 2 GiB at a time, and less on some systems
        if not count:
            raise CheckpointError(f"{stored.file} ended while it was read: did something write to it?")
        view = view[count:]
