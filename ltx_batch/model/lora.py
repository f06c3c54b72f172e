"""LoRA files on a transformer: W + weight * alpha / rank * B @ A (arXiv 2106.09685, section 4.1).

One rule decides how: layers that hold their weight in 16 bits or more get the sum written into it ("fused"), all others
get it as a branch beside them ("applied"), since a sum that is quantised again is another rounding of the whole layer.
Taking files off again gives back the very bits that were there, so the order of rows never changes a picture.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load
from torch import nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from ltx_batch.errors import LoraError
from ltx_batch.lora import LoraCache, LoraFile, LoraLayer, Shapes, parse_lora_file, some
from ltx_batch.request import LoraRef

if TYPE_CHECKING:
    from ltx_batch.model.pipeline import Stopwatch

_DOWN, _UP = "lora_down", "lora_up"  # buffers of a layer with a branch: they move with the layer


@dataclass(frozen=True, slots=True)
class Update:
    """What one file adds to one layer: scale * up @ down, with down [rank, in] and up [out, rank] as in the file."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA file with its weight. `updates` go by diffusers' names of the layers, the weight is in their scale."""

    file: LoraFile
    updates: Mapping[str, Update]
    weight: float
    sha256: str


def load_adapter(lora: LoraRef) -> Adapter:
    """From a reference that holds its bytes and their hash. Raises LoraError for a file that is no sound LoRA."""
    assert lora.data is not None and lora.sha256 is not None
    file = parse_lora_file(lora.data, str(lora.path))
    tensors = load(lora.data)
    wrong = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise LoraError(f"{lora.path} has values that are not finite: {some(wrong)}")
    updates = {name: _update(layer, tensors, lora.weight32) for name, layer in file.layers.items()}
    return Adapter(file, updates, lora.weight32, lora.sha256)


@torch.inference_mode()
def apply_loras(transformer: nn.Module, adapters: Sequence[Adapter], device: torch.device) -> LoraHandle:
    """Put all of `adapters` on the transformer at once, and return what takes them off again.

    The sums are made on `device`, wherever the layers lie meanwhile. Raises LoraError, before anything is changed,
    naming every file that does not fit.
    """
    check_fit([adapter.file for adapter in adapters], linear_shapes(transformer))
    by_layer: dict[str, list[Update]] = defaultdict(list)
    for adapter in adapters:
        for name, update in adapter.updates.items():
            by_layer[name].append(update)
    handle = LoraHandle([{"sha256": adapter.sha256, "weight": adapter.weight} for adapter in adapters])
    dtype = next(p.dtype for p in transformer.parameters() if p.is_floating_point())
    try:
        for name, updates in by_layer.items():
            layer = transformer.get_submodule(name)
            if isinstance(layer, nn.Linear) and takes_sums(layer):
                handle.fuse(layer, updates, device)
            else:
                handle.attach(layer, updates, device, dtype)
    except BaseException:
        handle.remove()
        raise
    return handle


def check_fit(files: Sequence[LoraFile], shapes: Shapes) -> None:
    """Raises LoraError with every file that does not fit a transformer with these linear layers."""
    faults = [f"{file.source}: {'; '.join(misfits)}" for file in files if (misfits := file.misfits(shapes))]
    if faults:
        raise LoraError("\n".join(faults))


def linear_shapes(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """out_features and in_features of every linear layer: of all modules with these attributes, however they hold it."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in transformer.named_modules()
        if isinstance(getattr(layer, "in_features", None), int)
        and isinstance(getattr(layer, "out_features", None), int)
    }


def takes_sums(layer: nn.Linear) -> bool:
    """Whether updates are fused into the layer's weight: it is a plain one of 16 bits or more."""
    return type(layer) is nn.Linear and layer.weight.is_floating_point() and layer.weight.dtype.itemsize >= 2


@dataclass(slots=True)
class LoraHandle:
    """LoRA files on a transformer, until `remove`. As a context manager it removes them at the block's end.

    The weights as they were wait in host memory: as many bytes as the fused layers have.
    """

    files: list[dict[str, Any]]
    fused: int = 0
    applied: int = 0
    _undo: list[Callable[[], object]] = field(default_factory=list)

    @property
    def ran(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"files": self.files, "fused_layers": self.fused, "applied_layers": self.applied}

    def fuse(self, layer: nn.Linear, updates: Sequence[Update], device: torch.device) -> None:
        """Add the updates to the weight in fp32, rounded once to the weight's own type."""
        base = layer.weight.detach().to("cpu", copy=True)
        total = layer.weight.to(device, torch.float32, copy=True)
        for update in updates:
            total.addmm_(_fp32(update.up, device), _fp32(update.down, device), alpha=update.scale)
        self._undo.append(partial(_overwrite, layer, base))
        layer.weight.copy_(total)
        self.fused += 1

    def attach(self, layer: nn.Module, updates: Sequence[Update], device: torch.device, dtype: torch.dtype) -> None:
        """Put a branch (x @ down.T) @ up.T beside the layer, in `dtype`; the files lie side by side in one pair."""
        down = torch.cat([_fp32(update.down, device) for update in updates])
        up = torch.cat([_fp32(update.up, device) * update.scale for update in updates], dim=1)
        place = next(chain(layer.parameters(), layer.buffers())).device
        layer.register_buffer(_DOWN, down.to(place, dtype), persistent=False)
        layer.register_buffer(_UP, up.to(place, dtype), persistent=False)
        hook = layer.register_forward_hook(_with_branch)
        self._undo.append(partial(_detach, layer, hook))
        self.applied += 1

    @torch.inference_mode()
    def remove(self) -> None:
        """Give the transformer back the bits it had."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> LoraHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class LoraSwitch:
    """Which LoRA files are on a transformer; rows of one set follow each other, so a change is rare."""

    def __init__(
        self,
        transformer: nn.Module,
        device: torch.device,
        options: Mapping[str, Any] | None = None,
        *,
        changing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Layers are changed within `changing()`."""
        self._transformer, self._device, self._changing = transformer, device, changing
        self._cache = LoraCache(options)
        self._on: tuple[tuple[str | None, float], ...] = ()
        self._handle = LoraHandle([])

    @property
    def ran(self) -> dict[str, Any]:
        """What a record says: empty without LoRA files."""
        return {"loras": self._handle.ran} if self._on else {}

    def use(self, loras: Sequence[LoraRef], watch: Stopwatch) -> None:
        """Have just these files on, a request's `lora_set`; a change is the stage `lora`. Raises LoraError."""
        loras = [lora if lora.data is not None else self._cache.fetch(lora) for lora in loras]
        wanted = tuple((lora.sha256, lora.weight32) for lora in loras)
        if wanted == self._on:
            return
        with watch.stage("lora"), self._changing():
            self.clear()
            self._handle = apply_loras(self._transformer, [load_adapter(lora) for lora in loras], self._device)
            self._on = wanted

    def clear(self) -> None:
        self._handle.remove()
        self._on = ()


def _update(layer: LoraLayer, tensors: Mapping[str, torch.Tensor], weight: float) -> Update:
    scale = layer.scale if layer.alpha is None else float(tensors[layer.alpha]) / layer.rank
    return Update(tensors[layer.down], tensors[layer.up], weight * scale)


def _fp32(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.to(device, torch.float32)


def _overwrite(layer: nn.Linear, base: torch.Tensor) -> None:
    layer.weight.copy_(base)


def _detach(layer: nn.Module, hook: RemovableHandle) -> None:
    hook.remove()
    del layer._buffers[_DOWN], layer._buffers[_UP]


def _with_branch(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """Added in place: two more results of a feed-forward's first layer are what a small card has no room for."""
    narrow = linear(inputs[0], layer.get_buffer(_DOWN)).flatten(0, -2)
    return output.flatten(0, -2).addmm_(narrow, layer.get_buffer(_UP).T).view(output.shape)
