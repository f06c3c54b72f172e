"""Prompts as the text encoder's tokenizer reads them: how many tokens, and which letters it does not know."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ltx_batch.errors import CheckpointError
from ltx_batch.manifest.cells import Cells, Fault
from ltx_batch.manifest.columns import MAX_TOKENS
from ltx_batch.manifest.rules import in_order

UNREAD_SHARE = 0.3  # of a prompt's letters: less is a name or an emoji, more is another alphabet
_END_MARK = 1


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as read: its number of tokens, end mark included, and the share of its letters, blanks left out, that became
    no piece of the vocabulary but `<unk>` or bare bytes."""

    tokens: int
    unread: float


class Reader(Protocol):
    def read(self, texts: list[str]) -> Iterator[Reading]: ...


class TokenCounter:
    """`tokenizer` is a tokenizer.json or a spiece.model; None: nothing is counted. `note` says why, where that is odd.

    Raises CheckpointError for a file that is neither.
    """

    def __init__(self, tokenizer: Path | None) -> None:
        self.note: str | None = None
        self._reader: Reader | None = None
        if tokenizer is not None and tokenizer.suffix == ".json":
            self._reader = _TokenizerJson(tokenizer)
        elif tokenizer is not None and find_spec("sentencepiece") is not None:
            self._reader = _SpieceModel(tokenizer)
        elif tokenizer is not None:
            self.note = (
                f"prompts are not counted in tokens: {tokenizer.parent} has only {tokenizer.name}, which takes: "
                "pip install sentencepiece"
            )

    def doubts(self, cells: Cells) -> list[Fault]:
        """A fault for every prompt and negative prompt of which the text encoder would not see the end, or not much."""
        names = ("prompt", "negative_prompt")
        return in_order([fault for name in names if name in cells for fault in self._doubts(name, cells.array(name))])

    def _doubts(self, name: str, texts: pa.Array) -> Iterator[Fault]:
        if self._reader is None:
            return
        # No token is shorter than a byte, and an opening space and the end mark come on top: short ASCII needs no count.
        # Other letters may be unfolded into several before they are cut into tokens.
        doubtful = pc.or_(pc.greater(pc.binary_length(texts), MAX_TOKENS - 2), pc.invert(pc.string_is_ascii(texts)))
        rows = np.flatnonzero(pc.fill_null(doubtful, False).to_numpy(zero_copy_only=False))
        found = texts.take(pa.array(rows)).to_pylist()
        for row, reading in zip(rows, self._reader.read(found), strict=True):
            if reading.tokens > MAX_TOKENS:
                rule = f"has {reading.tokens} tokens; the text encoder sees the first {MAX_TOKENS}"
                yield Fault(int(row), name, rule)
            if reading.unread > UNREAD_SHARE:
                rule = f"has {reading.unread:.0%} letters that the tokenizer does not know; the text encoder hardly sees them"
                yield Fault(int(row), name, rule)


class _TokenizerJson:
    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_file(str(path))
            self._foreign = _foreign_ids(json.loads(path.read_bytes())["model"], self._tokenizer)
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def read(self, texts: list[str]) -> Iterator[Reading]:
        for text, found in zip(texts, self._tokenizer.encode_batch(texts), strict=True):
            pairs = zip(found.ids, found.offsets, strict=True)
            unread = [span for number, span in pairs if number in self._foreign]
            yield Reading(len(found), share_in(text, unread) if unread else 0.0)


def share_in(text: str, spans: Sequence[tuple[int, int]]) -> float:
    """The part of a text's letters that lies in `spans` (start, end), which may overlap."""
    inside = np.zeros(len(text), bool)
    for start, end in spans:
        inside[start:end] = True
    letters = np.array([not letter.isspace() for letter in text])
    return float((inside & letters).sum() / max(1, letters.sum()))


def _foreign_ids(model: dict[str, Any], tokenizer: Any) -> frozenset[int]:
    """The ids of `<unk>`, and of the bytes that letters out of the vocabulary fall back to."""
    ids = {model.get("unk_id"), tokenizer.token_to_id(model.get("unk_token") or "")}
    if model.get("byte_fallback"):
        ids |= {tokenizer.token_to_id(f"<0x{value:02X}>") for value in range(256)}
    return frozenset(ids - {None})


class _SpieceModel:
    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # RuntimeError or OSError, with the C++ line that failed
            raise CheckpointError(f"{path} is not a SentencePiece model: {error}") from error

    def read(self, texts: list[str]) -> Iterator[Reading]:
        for text, pieces in zip(texts, self._processor.encode(texts, out_type=str), strict=True):
            read = sum(len(piece.replace("▁", "")) for piece in pieces if self._knows(piece))
            letters = len("".join(text.split()))
            yield Reading(len(pieces) + _END_MARK, max(0.0, 1 - read / max(1, letters)))

    def _knows(self, piece: str) -> bool:
        number = self._processor.piece_to_id(piece)
        return not (self._processor.is_unknown(number) or self._processor.is_byte(number))
