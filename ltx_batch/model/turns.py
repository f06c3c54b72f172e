"""The text encoder and the other parts of a model on one device: side by side where they fit, else one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal, Protocol

import torch

from ltx_batch.model.device import free_bytes, give_back
from ltx_batch.model.memory import USABLE
from ltx_batch.model.room import (
    ADVICE,
    ADVICE_ALONE,
    STREAMED_BYTES,
    WORKING_BYTES,
    Room,
    room_to_encode,
    room_to_render,
)
from ltx_batch.model.text import TextEncoder

_CPU = torch.device("cpu")
log = logging.getLogger(__name__)


class Others(Protocol):
    """What else wants the device. `held_bytes` is what it takes there now; what leaves comes back when it is to work."""

    @property
    def held_bytes(self) -> int: ...

    def leave(self) -> None: ...


class Nobody:
    """No others."""

    held_bytes = 0

    def leave(self) -> None:
        pass


class Turns:
    """Who is on the device. `load` makes the encoder, where it will work, when it is first asked for.

    An encoder that does not fit beside the others, or has once left for them, gets its blocks from host memory one by one,
    which takes as long as to bring it whole. Where there is no room for that either, the others leave, unless they cannot
    be moved: then it works on the CPU. One that runs out of memory all the same goes the same way down, and not up again.
    `relieve` gives back what is only there for speed, and says whether there was any. `told` says where the encoder is, and
    why.
    """

    def __init__(
        self,
        device: torch.device,
        load: Callable[[torch.device], TextEncoder],
        encoder_bytes: int,
        others: Others,
        *,
        movable: bool = True,
        relieve: Callable[[], bool] = lambda: False,
    ) -> None:
        self.told = "not loaded"
        self._device, self._load, self._encoder_bytes = device, load, encoder_bytes
        self._others: Others | None = others
        self._movable, self._relieve = movable, relieve
        self._most: Literal["whole", "blocks", "nothing"] = "whole"  # of it that still comes onto the device
        self._encoder: TextEncoder | None = None
        self._streams = False
        self._at_work_bytes = 0

    @property
    def held_bytes(self) -> int:
        """What the encoder takes of the device now."""
        return 0 if self._encoder is None else self._encoder.held_bytes

    def encode(self, text: str) -> torch.Tensor:
        """As `TextEncoder.encode`, wherever the encoder can work; each time it runs out of memory, one step down."""
        while True:
            try:
                return self.encoder().encode(text)
            except torch.OutOfMemoryError as error:
                if not self._relieve() and not self._step_down():
                    raise
                message = str(error).partition("\n")[0]
            give_back(self._device)  # only here has the error let go of what filled it
            log.warning("the text encoder ran out of memory, and tries again with less (%s)", message)

    def encoder(self) -> TextEncoder:
        """The text encoder, where it can work. The others may have left the device for it."""
        encoder = self._come()
        if encoder.device == self._device and self._others is not None:
            self._at_work_bytes = max(self._at_work_bytes, self._others.held_bytes + encoder.held_bytes + WORKING_BYTES)
        return encoder

    def _come(self) -> TextEncoder:
        if self._encoder is not None and self._encoder.device == self._device:
            return self._encoder
        assert self._others is not None
        free = free_bytes(self._device)
        room = room_to_encode(free, self._encoder_bytes)
        if self._most != "whole":
            room = Room(False, "it ran out of memory there")
        if self._encoder is None and room.enough:
            self._tell("on the device", room.reason)
            self._encoder = self._load(self._device)
            return self._encoder
        if free is not None and free < STREAMED_BYTES and self._movable and self._most != "nothing":
            self._others.leave()
            free = free_bytes(self._device)
        if self._encoder is None:
            self._encoder = self._load(_CPU)
        if self._most != "nothing" and (free is None or free >= STREAMED_BYTES):
            self._tell("on the device, block by block", room.reason)
            self._streams = True
            self._encoder.stream(self._device)
        else:
            advice = ADVICE_ALONE if isinstance(self._others, Nobody) else ADVICE
            self._tell("on the CPU", f"{room.reason}; {advice}")
        return self._encoder

    def _step_down(self) -> bool:
        """Whether there is anything left to step down from."""
        if self._most == "nothing":
            return False
        if not self._streams:
            self._most = "blocks"
        elif self._movable and self._others is not None and self._others.held_bytes:
            self._others.leave()
        else:
            self._most = "nothing"
        if self._encoder is not None:
            self._encoder.leave()
        return True

    def let_others_work(self, peak_bytes: int) -> None:
        """The encoder leaves the device if the others, which want `peak_bytes` in all, have not enough with it there."""
        if self._encoder is None or self._encoder.device != self._device:
            return
        assert self._others is not None
        free = free_bytes(self._device)
        room = room_to_render(None if free is None else int(USABLE * (free + self._others.held_bytes)), peak_bytes)
        if not room.enough:
            self._encoder.leave()
            give_back(self._device)
            self._tell("left the device", room.reason)

    def peak_bytes(self, render_bytes: int) -> int:
        """The peak of a render that takes so much without the encoder: with it there, or when it worked on its texts."""
        return max(render_bytes + self.held_bytes, self._at_work_bytes)

    def tell(self) -> str:
        """Where the encoder is, and why. A render ends with it, and what comes next is another's."""
        self._at_work_bytes = 0
        return self.told

    def close(self) -> None:
        self._encoder, self._others = None, None

    def _tell(self, where: str, why: str) -> None:
        """Logged where it changes, and not for every text."""
        if not self.told.startswith(f"{where}: "):
            log.info("text encoder %s: %s", where, why)
        self.told = f"{where}: {why}"
