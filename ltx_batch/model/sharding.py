"""A transformer over several GPUs of one process: each holds some of its blocks, which work where they lie."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

BLOCKS = "transformer_blocks"


def device_map(parts: Sequence[str], shards: Sequence[int]) -> dict[str, int]:
    """Which device each part of a model is on, by number: `shards` blocks on each, in order, and all else on the first.
    `parts` are the names of the model's children and of its own parameters."""
    homes = [number for number, count in enumerate(shards) for _ in range(count)]
    places = {name: 0 for name in parts if name != BLOCKS}
    return places | {f"{BLOCKS}.{index}": number for index, number in enumerate(homes)}


def deal_out(transformer: Any, shards: Sequence[int], devices: Sequence[torch.device]) -> Callable[[], None]:
    """Have accelerate put each block on its device and bring the hidden states along. Returns what takes all of that back,
    but for where the weights lie.

    What a call gives to every block (rotary tables, modulations, text) accelerate would bring once a block; here it comes
    once a device.
    """
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    own = dict(transformer.named_parameters(recurse=False))
    for parameter in own.values():  # accelerate wants to know their places, and leaves them where they are
        parameter.data = parameter.data.to(devices[0])
    numbers = device_map([*own, *(name for name, _ in transformer.named_children())], shards)
    places: Any = {name: devices[number] for name, number in numbers.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following device_map keys do not match")  # those parameters
        dispatch_model(transformer, places, main_device=devices[0], force_hooks=True)
    carried = _Carried()
    handles = [
        block.register_forward_pre_hook(carried.bring_to(places[f"{BLOCKS}.{index}"]), with_kwargs=True)
        for index, block in enumerate(transformer.transformer_blocks)
    ]
    handles.append(transformer.register_forward_hook(carried.forget))

    def undo() -> None:
        for handle in handles:
            handle.remove()
        remove_hook_from_submodules(transformer)

    return undo


class _Carried:
    """Copies of a call's tensors on other devices, until it ends."""

    def __init__(self) -> None:
        self._copies: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def bring_to(self, device: torch.device) -> Any:
        def hook(block: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            moved = {name: self._moved(value, device, kept=name != "hidden_states") for name, value in kwargs.items()}
            return args, moved

        return hook

    def forget(self, *_: object) -> None:
        self._copies.clear()

    def _moved(self, value: Any, device: torch.device, *, kept: bool) -> Any:
        if isinstance(value, tuple):
            return tuple(self._moved(one, device, kept=kept) for one in value)
        if not isinstance(value, torch.Tensor) or value.device == device:
            return value
        if not kept:
            return value.to(device)
        key = (id(value), device)
        if key not in self._copies:
            self._copies[key] = (value, value.to(device))  # with the original, so that no other tensor takes its id
        return self._copies[key][1]
