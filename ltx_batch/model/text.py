"""Prompts to embeddings: T5 with its mask, 256 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ltx_batch.model.checkpoint import TextLoader
from ltx_batch.model.guests import Streamed
from ltx_batch.model.text_key import MAX_TOKENS, as_encoded

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Text:
    """Encoded text: `embeds` [rows, 256, channels], `mask` bool [rows, 256], False where the tokenizer padded."""

    embeds: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of_tokens(cls, tokens: torch.Tensor) -> Text:
        """One row of the embeddings of its real tokens [tokens, channels]; what is padded is zero.

        T5 has values of its own behind the last token. The transformer's mask takes them out again, but a quantiser that
        looks at a whole tensor sees them: with zeros a picture hangs on nothing but the text.
        """
        count = len(tokens)
        embeds = tokens.new_zeros(1, MAX_TOKENS, tokens.shape[1])
        embeds[0, :count] = tokens
        return cls(embeds, (torch.arange(MAX_TOKENS, device=tokens.device) < count)[None])

    @classmethod
    def stack(cls, texts: Sequence[Text]) -> Text:
        if len(texts) == 1:
            return texts[0]  # the very tensors, by which they are known again
        return cls(torch.cat([text.embeds for text in texts]), torch.cat([text.mask for text in texts]))

    def to(self, device: torch.device) -> Text:
        return Text(self.embeds.to(device), self.mask.to(device))


class TextEncoder:
    """T5 and its tokenizer on one device. Encodes one text at a time, so that it never depends on its neighbours."""

    def __init__(self, tokenizer: Any, model: Any, device: torch.device) -> None:
        self.tokenizer = tokenizer
        self.model = model.to(device)
        self.device = device
        self._streamed: Streamed | None = None

    @classmethod
    def load(cls, parts: TextLoader, device: torch.device) -> TextEncoder:
        """Raises CheckpointError."""
        with torch.inference_mode(False):  # tensors of inference could never be moved between their places
            return cls(parts.tokenizer, parts.load(device), device)

    @torch.inference_mode()
    def encode(self, text: str) -> torch.Tensor:
        """Embeddings of the text's tokens, end mark included, [tokens, channels]; tokens after the 256th are cut."""
        found = self.tokenizer(
            [as_encoded(text)],
            padding="max_length",
            padding_side="right",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = found.input_ids.to(self.device), found.attention_mask.to(self.device)
        return self.model(input_ids=ids, attention_mask=mask)[0][0, : int(found.attention_mask.sum())]

    def stream(self, device: torch.device) -> None:
        """Work on `device`, with the blocks in host memory, from where they come one by one."""
        if self._streamed is None:
            self._streamed = Streamed(self.model, list(self.model.encoder.block), device)
        self._streamed.come()
        self.device = device

    def leave(self) -> None:
        """Be in host memory alone, and work there until `stream`."""
        if self._streamed is None:
            self._streamed = Streamed(self.model, list(self.model.encoder.block), self.device)
        self._streamed.leave()
        self.device = _CPU

    @property
    def held_bytes(self) -> int:
        """What it takes of a device other than the CPU."""
        if self._streamed is not None:
            return self._streamed.held_bytes
        return 0 if self.device.type == "cpu" else sum(p.numel() * p.element_size() for p in self.model.parameters())
