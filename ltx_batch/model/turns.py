"""The text encoder and the other parts of a model on one device: side by side where they fit, else by turns."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch

from ltx_batch.model.device import free_bytes, give_back
from ltx_batch.model.memory import USABLE
from ltx_batch.model.room import STREAMED_BYTES, Room, room_to_encode, room_to_render
from ltx_batch.model.text import TextEncoder

_CPU = torch.device("cpu")
log = logging.getLogger(__name__)


class Others(Protocol):
    """What else wants the device. `held_bytes` is what it takes there now."""

    @property
    def held_bytes(self) -> int: ...

    def leave(self) -> None: ...

    def come_back(self) -> None: ...


class Turns:
    """Who is on the device. `load` makes the encoder, where it will work, when it is first asked for.

    `others` give way to an encoder that does not fit beside them, unless they cannot be moved. An encoder that does not
    fit then either gets its blocks from host memory one by one; on a device without room for that it works on the CPU.
    `told` says where the encoder is, and why.
    """

    def __init__(
        self,
        device: torch.device,
        load: Callable[[torch.device], TextEncoder],
        encoder_bytes: int,
        others: Others,
        *,
        movable: bool = True,
    ) -> None:
        self.told = "not loaded"
        self._device, self._load, self._encoder_bytes = device, load, encoder_bytes
        self._others: Others | None = others
        self._movable = movable
        self._encoder: TextEncoder | None = None
        self._away = False

    @property
    def held_bytes(self) -> int:
        """What the encoder takes of the device now."""
        return 0 if self._encoder is None else self._encoder.held_bytes

    def encoder(self) -> TextEncoder:
        """The text encoder, where it can work. The others may have left the device for it."""
        if self._encoder is not None and self._encoder.device == self._device:
            return self._encoder
        assert self._others is not None
        free = free_bytes(self._device)
        room = room_to_encode(free, self._encoder_bytes)
        if not room.enough and self._movable:
            self._away = True
            self._others.leave()
            free = free_bytes(self._device)
            room = room_to_encode(free, self._encoder_bytes)
        if room.enough:
            self._tell(f"on the device{', by turns' if self._away else ''}: {room.reason}")
            return self._bring(self._device)
        if free is not None and free >= STREAMED_BYTES:
            self._tell(f"on the device, block by block: {room.reason}")
            return self._stream()
        self._tell(f"on the CPU: {room.reason}")
        return self._bring(_CPU)

    def let_others_work(self, peak_bytes: int) -> None:
        """The others are on the device or can come, where they want `peak_bytes` in all, if the encoder's leaving can give
        them."""
        assert self._others is not None
        if self._encoder is not None and self._encoder.device == self._device:
            room = self._room_to_render(self._others, peak_bytes)
            if not room.enough:
                self._encoder.to(_CPU)
                give_back(self._device)
                self._tell(f"left the device: {room.reason}")
        if self._away:
            self._others.come_back()
            self._away = False

    def close(self) -> None:
        self._encoder, self._others = None, None

    def _room_to_render(self, others: Others, peak_bytes: int) -> Room:
        free = free_bytes(self._device)
        return room_to_render(None if free is None else int(USABLE * (free + others.held_bytes)), peak_bytes)

    def _bring(self, to: torch.device) -> TextEncoder:
        if self._encoder is None:
            self._encoder = self._load(to)
        else:
            self._encoder.to(to)
        return self._encoder

    def _stream(self) -> TextEncoder:
        if self._encoder is None:
            self._encoder = self._load(_CPU)
        self._encoder.stream(self._device)
        return self._encoder

    def _tell(self, what: str) -> None:
        self.told = what
        log.info("text encoder %s", what)
