"""The text encoder and the other parts of a model on one device: side by side where they fit, else by turns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ltx_batch.model.device import free_bytes
from ltx_batch.model.room import Room, room_to_encode, room_to_render
from ltx_batch.model.text import TextEncoder

_CPU = torch.device("cpu")
log = logging.getLogger(__name__)


class Turns:
    """Who is on the device. `load` makes the encoder, where it will work, when it is first asked for.

    `others` lie on the device and give way to an encoder that does not fit beside them, unless they cannot be moved:
    then the encoder works on the CPU. `told` says where the encoder is, and why.
    """

    def __init__(
        self,
        device: torch.device,
        load: Callable[[torch.device], TextEncoder],
        encoder_bytes: int,
        others: Sequence[nn.Module],
        *,
        movable: bool = True,
    ) -> None:
        self.told = "not loaded"
        self._device, self._load, self._encoder_bytes = device, load, encoder_bytes
        self._others, self._movable = others, movable
        self._encoder: TextEncoder | None = None
        self._away = False

    def encoder(self) -> TextEncoder:
        """The text encoder, where it can work. The others may have left the device for it."""
        if self._encoder is not None and self._encoder.device == self._device:
            return self._encoder
        room = room_to_encode(free_bytes(self._device), self._encoder_bytes)
        if not room.enough and not self._movable:
            self._tell(f"on the CPU: {room.reason}, and quantised parts stay where they are")
            return self._bring(_CPU)
        if not room.enough:
            self._away = True
            self._move_others(_CPU)
        self._tell(f"on the device{'' if room.enough else ', by turns'}: {room.reason}")
        return self._bring(self._device)

    def let_others_work(self, working_bytes: int) -> None:
        """The others are on the device, with `working_bytes` to spare if the encoder's leaving can give them."""
        if self._encoder is not None and self._encoder.device == self._device:
            room = self._room_to_render(working_bytes)
            if not room.enough:
                self._encoder.to(_CPU)
                _give_back(self._device)
                self._tell(f"left the device: {room.reason}")
        if self._away:
            self._move_others(self._device)
            self._away = False

    def close(self) -> None:
        self._encoder, self._others = None, ()

    def _bring(self, to: torch.device) -> TextEncoder:
        if self._encoder is None:
            self._encoder = self._load(to)
        else:
            self._encoder.to(to)
        return self._encoder

    def _room_to_render(self, working_bytes: int) -> Room:
        away = sum(held_bytes(module) for module in self._others) if self._away else 0
        return room_to_render(free_bytes(self._device), away + working_bytes)

    def _move_others(self, to: torch.device) -> None:
        for module in self._others:
            module.to(to)
        _give_back(self._device)

    def _tell(self, what: str) -> None:
        self.told = what
        log.info("text encoder %s", what)


def held_bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def _give_back(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
