"""Bytes of tensors that live at once, counted as they are made; on the meta device nothing need be there."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """The most bytes of tensors that live at once, but those that lived before."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        key, taken = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += taken
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, taken)

    def _forget(self, key: int, taken: int) -> None:
        self._known.discard(key)
        self.now -= taken
