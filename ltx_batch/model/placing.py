"""The placements of one process: decided once for each kind of work, and lower once memory has run out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from ltx_batch.model.device import give_back
from ltx_batch.model.memory import ModelSizes, Work
from ltx_batch.model.placement import Mode, Placement, Room, Strain, decide, step_down

Result = TypeVar("Result")
log = logging.getLogger(__name__)
_REMEMBERED = 64  # kinds of work; every timestep or guidance weight of a row's own makes another


class Placing:
    """`room` tells what memory there is, and is asked when work is first met. `asked` is a placement's name; `mode` how
    the parts live by now, of which only `resident` may still change. `relieve` gives back what is only there for speed,
    and says whether there was any.

    `told` says, step by step, what running out of memory has changed.
    """

    def __init__(
        self,
        sizes: ModelSizes,
        asked: str,
        device: torch.device,
        *,
        room: Callable[[], Room],
        mode: Callable[[], Mode | None],
        relieve: Callable[[], bool] = lambda: False,
    ) -> None:
        self.told: list[str] = []
        self._sizes, self._asked, self._device, self._room, self._mode = sizes, asked, device, room, mode
        self._relieve, self._strain = relieve, Strain()
        self._placements: dict[tuple[Work, str], Placement] = {}

    def placement(self, work: Work) -> Placement:
        """How this work is done from now on."""
        mode = self._mode()
        asked = self._asked if mode in (None, "resident") else mode
        known = self._placements.pop((work, asked), None)
        found = known or decide(self._sizes, work, self._room(), asked, self._strain)
        self._placements[work, asked] = found  # the last one asked for is the last to be forgotten
        if known is None:
            log.log(logging.INFO if found.fits else logging.WARNING, "placement %s: %s", found.mode, found.reason)
        if len(self._placements) > _REMEMBERED:
            del self._placements[next(iter(self._placements))]
        return found

    def attempt(self, work: Work, stage: Callable[[], str], render: Callable[[Placement], Result]) -> Result:
        """`render` under the work's placement, and once more under a lower one each time it runs out of memory.

        `stage` names what it was at. Raises what it raised when there is nothing lower.
        """
        while True:
            placement = self.placement(work)
            try:
                return render(placement)
            except torch.OutOfMemoryError as error:
                relieved = self._relieve()
                lower = step_down(self._sizes, self._strain, stage(), placement, work)
                if lower is None and not relieved:
                    raise
                message = str(error).partition("\n")[0]
            # Only here has the error let go of what filled the device.
            give_back(self._device)
            if relieved or lower is None:
                log.warning("%s ran out of memory: recorded calls are given up (%s)", stage(), message)
                continue
            self._strain = lower
            self._placements.clear()
            self.told.append(f"{stage()} ran out of memory: {self.placement(work).reason}")
            log.warning("%s (%s)", self.told[-1], message)
