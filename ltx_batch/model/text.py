"""Prompts to embeddings: T5 with its mask, 256 tokens, each distinct text once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

MAX_TOKENS = 256
_CACHED_TEXTS = 64  # 2 MiB each with T5-XXL in bf16


@dataclass(frozen=True, slots=True)
class Text:
    """Encoded text: `embeds` [rows, 256, channels], `mask` bool [rows, 256], False where the tokenizer padded."""

    embeds: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def stack(cls, texts: Sequence[Text]) -> Text:
        return cls(torch.cat([text.embeds for text in texts]), torch.cat([text.mask for text in texts]))

    def to(self, device: torch.device) -> Text:
        return Text(self.embeds.to(device), self.mask.to(device))


class TextEncoder:
    """Encodes one text at a time, so that a text's embedding never depends on its neighbours, and keeps the last ones."""

    def __init__(self, tokenizer: Any, model: Any, device: torch.device) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._device = device
        self._cache: OrderedDict[str, Text] = OrderedDict()

    def encode(self, text: str) -> Text:
        """One row, on the device. Blanks at both ends are dropped and the rest is taken as written, as the official
        pipeline does (pipeline_ltx_video.py, _text_preprocessing); tokens after the 256th are cut."""
        text = text.strip()
        if text not in self._cache:
            self._cache[text] = self._encode(text)
            while len(self._cache) > _CACHED_TEXTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(text)
        return self._cache[text]

    def _encode(self, text: str) -> Text:
        found = self._tokenizer(
            [text], padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        )
        ids, mask = found.input_ids.to(self._device), found.attention_mask.to(self._device)
        return Text(self._model(input_ids=ids, attention_mask=mask)[0], mask.bool())
