"""Weights from files into a module, piece by piece: no file is ever held whole beside them, and none is mapped.

Libraries map a file and cast it tensor by tensor, and the mapped pages stay beside the cast ones to the end: three times
the weights for fp32 on disk and bf16 in memory. Here the host holds the weights that stay there and a few pieces.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from ltx_batch.errors import CheckpointError
from ltx_batch.tensor_file import ITEM_BYTES, StoredTensor

_PIECE_BYTES = {"cpu": 2**18, "cuda": 2**22}  # a copy to a GPU takes its time to begin
_READERS = 8  # one alone waits for the disk, and then the disk for it
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
    filled: dict[int, torch.Tensor] = {}
    reads: list[tuple[StoredTensor, torch.Tensor]] = []
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start)):
        if id(homes[name]) not in filled:
            owner, _, leaf = name.rpartition(".")
            own = getattr(module.get_submodule(owner), "STORED", {}).get(leaf, dtype)
            weight = torch.empty(stored.shape, dtype=own, device=device)
            reads.append((stored, weight))
            trainable = isinstance(homes[name], nn.Parameter)
            filled[id(homes[name])] = nn.Parameter(weight, requires_grad=False) if trainable else weight
    _read(reads, device)
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


def _read(reads: Sequence[tuple[StoredTensor, torch.Tensor]], device: torch.device) -> None:
    """Each tensor from its place. Threads read ahead, and this one casts and copies: work on a CPU from several threads
    would start a team of OpenMP's for each."""
    piece_bytes = _PIECE_BYTES[device.type]
    held = [torch.empty(piece_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda") for _ in range(_READERS)]
    waiting: deque[tuple[Future[None], torch.Tensor, torch.Tensor]] = deque()

    def take() -> None:
        read, source, part = waiting.popleft()
        try:
            read.result()
        finally:
            del read  # which holds its error, and that this frame with all weights
        if source.data_ptr() != part.data_ptr():
            part.copy_(source)

    with ExitStack() as files, ThreadPoolExecutor(_READERS) as readers:
        handles = {
            file: files.enter_context(Path(file).open("rb", buffering=0)).fileno()
            for file in {stored.file for stored, _ in reads}
        }
        for number, (stored, start, part) in enumerate(_pieces(reads, piece_bytes)):
            if len(waiting) == _READERS:
                take()
            kind = _DTYPES[stored.dtype]
            straight = device.type == "cpu" and kind == part.dtype
            source = part if straight else held[number % _READERS][: part.numel() * kind.itemsize].view(kind)
            waiting.append(
                (readers.submit(_read_bytes, handles[stored.file], start, source, stored.file), source, part)
            )
        while waiting:
            take()


def _pieces(
    reads: Iterable[tuple[StoredTensor, torch.Tensor]], piece_bytes: int
) -> Iterator[tuple[StoredTensor, int, torch.Tensor]]:
    """Of each tensor its pieces: where in the file they begin, and where they go."""
    for stored, weight in reads:
        start = stored.start
        for part in weight.view(-1).split(piece_bytes // ITEM_BYTES[stored.dtype]):
            yield stored, start, part
            start += part.numel() * ITEM_BYTES[stored.dtype]


def _read_bytes(handle: int, start: int, target: torch.Tensor, file: str) -> None:
    view = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type] # an array is a buffer
    while view:
        count = os.preadv(handle, [view], start)
        if not count:
            raise CheckpointError(f"{file} ended while it was read: did something write to it?")
        view, start = view[count:], start + count
