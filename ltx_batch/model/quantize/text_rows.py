"""Keys and values of the prompts, kept over the steps and passes of a clip: they hang on nothing but the prompt.

Rows are known again by their embeddings, number by number, since batches change from step to step: negative prompt,
prompt, and the prompt once more for spatio-temporal guidance. What only pads a prompt to its 256 tokens is left out, where
every row of a call has it: attention gives it no weight, but takes as long over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

KeysValues = tuple[torch.Tensor, torch.Tensor]
_STEP = 8  # tokens: a mask of another width is copied by torch before every use
_STEADY_STEP = 64  # tokens, of calls that are recorded: each length is another recording


class TextRows:
    """Which prompts the transformer's current call is about, and what its blocks keep of them."""

    def __init__(self) -> None:
        self._keeping = False
        self._known: torch.Tensor | None = None
        self._current: list[int] = []
        self._length: int | None = None  # tokens of the prompts that the current call reads
        self._masked = True
        self._steady = False
        self._noted: tuple[torch.Tensor | None, torch.Tensor | None, bool] = (None, None, False)
        self._kept: dict[tuple[int, int], KeysValues] = {}
        self._places: dict[tuple[int, int], KeysValues] | None = None

    @property
    def read(self) -> tuple[tuple[int, ...], int | None] | None:
        """Which prompts the current call reads, by their places, and how many tokens of them; None: nothing is kept."""
        return (tuple(self._current), self._length) if self._keeping else None

    @property
    def complete(self) -> bool:
        """Whether the first block, and so every one, has what the current call reads."""
        return all(self._kept_tokens(0, row) >= (self._length or 0) for row in self._current)

    def note(self, embeds: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """A call begins, with embeddings [B, T, C] and their mask [B, T]."""
        last_embeds, last_mask, steady = self._noted
        if not self._keeping or (embeds is last_embeds and mask is last_mask and steady == self._steady):
            return
        self._noted = embeds, mask, self._steady
        seen = embeds if self._known is None else torch.cat([self._known, embeds])
        same = (embeds[:, None] == seen[None]).flatten(2).all(2)
        lasts, counts = _lengths(embeds, mask)
        firsts, ends, real = torch.stack(
            [same.int().argmax(1), lasts, counts]
        ).tolist()  # waits for the GPU, once a call
        new = sorted({first for first in firsts if self._known is None or first >= len(self._known)})
        count = 0 if self._known is None else len(self._known)
        numbers = {first: count + place for place, first in enumerate(new)}
        self._current = [numbers.get(first, first) for first in firsts]
        self._length, self._masked = _read(ends, real, embeds.shape[1], steady=self._steady)
        if new:
            fresh = seen[new]
            self._known = fresh if self._known is None else torch.cat([self._known, fresh])

    def of(self, block: int, states: torch.Tensor, project: Callable[[torch.Tensor], KeysValues]) -> KeysValues:
        """Keys and values [B, t, D] of the current call for a block, of the t tokens that are read; `project` makes those
        of rows of `states` [B, T, D]."""
        if not self._keeping:
            return project(states)
        length = self._length or states.shape[1]
        absent = {row: at for at, row in enumerate(self._current) if self._kept_tokens(block, row) < length}
        if absent:
            keys, values = project(states[list(absent.values()), :length])
            for row, key, value in zip(absent, keys, values, strict=True):
                self._kept[block, row] = self._at_its_place(block, row, states.shape[1], (key, value))
        found = [self._kept[block, row] for row in self._current]
        if len(found) == 1:
            return found[0][0][None, :length], found[0][1][None, :length]
        return torch.stack([key[:length] for key, _ in found]), torch.stack([value[:length] for _, value in found])

    def mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """What of an additive mask [B, 1, T] is left for the tokens that are read; None where none of them is masked."""
        if not self._keeping or mask is None:
            return mask
        return mask[..., : self._length] if self._masked else None

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Within it, calls read prompts up to a multiple of 64 tokens, and with a mask, so that calls about other prompts
        are made of the same kernels."""
        self._steady = True
        try:
            yield
        finally:
            self._steady = False

    def fix(self) -> None:
        """From now on keys and values lie at one address for each block and row, the next clip's where this one's were."""
        if self._places is None:
            self._places = {}
            self._kept.clear()

    def release(self) -> None:
        """Give the memory of those places back."""
        if self._places is not None:
            self._places = None
            self._kept.clear()

    def _at_its_place(self, block: int, row: int, tokens: int, found: KeysValues) -> KeysValues:
        if self._places is None:
            return found
        if (block, row) not in self._places:
            key, value = (one.new_empty(tokens, one.shape[1]) for one in found)
            self._places[block, row] = key, value
        count = len(found[0])
        key, value = (place[:count].copy_(one) for place, one in zip(self._places[block, row], found, strict=True))
        return key, value

    def _kept_tokens(self, block: int, row: int) -> int:
        kept = self._kept.get((block, row))
        return 0 if kept is None else len(kept[0])

    @contextmanager
    def keep(self) -> Iterator[None]:
        self._keeping = True
        try:
            yield
        finally:
            self._keeping, self._known, self._current, self._length = False, None, [], None
            self._noted = None, None, False
            self._kept.clear()


def _lengths(embeds: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row, where its last token ends, and how many it has; all of them, where there is no mask as it comes."""
    rows, tokens = embeds.shape[:2]
    if mask is None or mask.ndim != 2:
        every = torch.full((rows,), tokens, device=embeds.device)
        return every, every
    real = mask.bool()
    return (real * torch.arange(1, tokens + 1, device=mask.device)).amax(1), real.sum(1)


def _read(ends: list[int], real: list[int], tokens: int, *, steady: bool = False) -> tuple[int, bool]:
    """How many tokens must be read, and whether some of them are masked."""
    if 0 in real:  # where all are masked, all count alike
        return tokens, True
    longest = max(ends)
    if min(real) == longest and not steady:
        return longest, False
    step = _STEADY_STEP if steady else _STEP
    return min(tokens, -(-longest // step) * step), True


def watch(transformer: Any, rows: TextRows) -> None:
    """Have `rows` note every call of the transformer."""
    transformer.text_rows = rows
    transformer.register_forward_pre_hook(_note, with_kwargs=True)


def _note(transformer: Any, args: Any, kwargs: dict[str, Any]) -> None:
    embeds = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
    transformer.text_rows.note(embeds, kwargs.get("encoder_attention_mask"))


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
