"""Keys and values of the prompts, kept over the steps and passes of a clip: they hang on nothing but the prompt.

Rows are known again by their embeddings, number by number, since batches change from step to step: negative prompt,
prompt, and the prompt once more for spatio-temporal guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

KeysValues = tuple[torch.Tensor, torch.Tensor]


class TextRows:
    """Which prompts the transformer's current call is about, and what its blocks keep of them."""

    def __init__(self) -> None:
        self._keeping = False
        self._known: torch.Tensor | None = None
        self._current: list[int] = []
        self._kept: dict[tuple[int, int], KeysValues] = {}

    def note(self, embeds: torch.Tensor) -> None:
        """A call begins, with embeddings [B, T, C]."""
        if not self._keeping:
            return
        seen = embeds if self._known is None else torch.cat([self._known, embeds])
        same = (embeds[:, None] == seen[None]).flatten(2).all(2)
        firsts = same.int().argmax(1).tolist()  # waits for the GPU, once a call
        new = sorted({first for first in firsts if self._known is None or first >= len(self._known)})
        count = 0 if self._known is None else len(self._known)
        numbers = {first: count + place for place, first in enumerate(new)}
        self._current = [numbers.get(first, first) for first in firsts]
        if new:
            fresh = seen[new]
            self._known = fresh if self._known is None else torch.cat([self._known, fresh])

    def of(self, block: int, states: torch.Tensor, project: Callable[[torch.Tensor], KeysValues]) -> KeysValues:
        """Keys and values [B, T, D] of the current call for a block; `project` makes those of rows of `states` [B, T, D]."""
        if not self._keeping:
            return project(states)
        absent = {row: at for at, row in enumerate(self._current) if (block, row) not in self._kept}
        if absent:
            keys, values = project(states[list(absent.values())])
            for row, key, value in zip(absent, keys, values, strict=True):
                self._kept[block, row] = (key, value)
        found = [self._kept[block, row] for row in self._current]
        if len(found) == 1:
            return found[0][0][None], found[0][1][None]
        return torch.stack([key for key, _ in found]), torch.stack([value for _, value in found])

    @contextmanager
    def keep(self) -> Iterator[None]:
        self._keeping = True
        try:
            yield
        finally:
            self._keeping, self._known, self._current = False, None, []
            self._kept.clear()


def watch(transformer: Any, rows: TextRows) -> None:
    """Have `rows` note every call of the transformer."""
    transformer.text_rows = rows
    transformer.register_forward_pre_hook(_note, with_kwargs=True)


def _note(transformer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    transformer.text_rows.note(kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1])


@contextmanager
def text_kept(transformer: Any) -> Iterator[None]:
    """Within it, keys and values of a prompt are computed once; nothing may change the transformer meanwhile.

    A transformer without fused blocks computes them at every call, here as elsewhere.
    """
    rows = getattr(transformer, "text_rows", None)
    if rows is None:
        yield
        return
    with rows.keep():
        yield
