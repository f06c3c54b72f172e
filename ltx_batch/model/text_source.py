"""Where embeddings come from: this process's memory, the cache, the encoder, in that order."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable

import torch

from ltx_batch.errors import EmbeddingMissing
from ltx_batch.model.text import Text
from ltx_batch.model.text_cache import TextCache
from ltx_batch.model.text_key import as_encoded

_REMEMBERED_TEXTS = 64  # 2 MiB each with T5-XXL in bf16


class TextSource:
    """Embeddings on `device`. `encode` is `Turns.encode`, and is asked only for what nothing else holds; None: there is no
    text encoder, and a text that the cache lacks raises EmbeddingMissing. `fetch` may be called from any thread."""

    def __init__(
        self, device: torch.device, *, encode: Callable[[str], torch.Tensor] | None, cache: TextCache | None = None
    ) -> None:
        self._device, self._encode, self._cache = device, encode, cache
        self._prompts, self._negatives = _Recent(), _Recent()
        self._counts: Counter[str] = Counter()
        self._fetched: set[str] = set()

    def encode(self, text: str, *, negative: bool = False) -> Text:
        """One row, on the device. Negative prompts are remembered apart: most jobs have one, which no number of prompts
        may push out."""
        recent = self._negatives if negative else self._prompts
        text = as_encoded(text)
        found, origin = recent.find(text), "memory"
        if found is None:
            tokens, origin = self._obtain(text)
            found = recent.keep(text, Text.of_tokens(tokens.to(self._device)))
        elif text in self._fetched:
            origin = "cache"
        self._fetched.discard(text)
        self._counts[origin] += 1
        return found

    def fetch(self, text: str, *, negative: bool = False) -> None:
        """Bring a text's embedding from the cache into memory, ahead of its render. Raises EmbeddingMissing where nothing
        can make it."""
        recent = self._negatives if negative else self._prompts
        text = as_encoded(text)
        if self._cache is None or recent.find(text) is not None:
            return
        tokens = self._cache.get(text)
        if tokens is not None:
            recent.keep(text, Text.of_tokens(tokens.to(self._device)))
            self._fetched.add(text)
        elif self._encode is None:
            raise _missing(text, self._cache)

    def taken(self) -> dict[str, int]:
        """How many embeddings came from `memory`, `cache` and `encoder` since this was last asked."""
        counts, self._counts = dict(self._counts), Counter()
        return counts

    def _obtain(self, text: str) -> tuple[torch.Tensor, str]:
        if self._cache is not None and (tokens := self._cache.get(text)) is not None:
            return tokens, "cache"
        if self._encode is None:
            raise _missing(text, self._cache)
        tokens = self._encode(text)
        return tokens if self._cache is None else self._cache.put(text, tokens), "encoder"


class _Recent:
    """The texts that were used last. Thread-safe."""

    def __init__(self) -> None:
        self._texts: OrderedDict[str, Text] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, text: str) -> Text | None:
        with self._lock:
            if text in self._texts:
                self._texts.move_to_end(text)
            return self._texts.get(text)

    def keep(self, text: str, encoded: Text) -> Text:
        with self._lock:
            self._texts[text] = encoded
            if len(self._texts) > _REMEMBERED_TEXTS:
                self._texts.popitem(last=False)
        return encoded


def _missing(text: str, cache: TextCache | None) -> EmbeddingMissing:
    """The first line is the same for every text, so that a run's many are counted as one."""
    place = "there is no text cache" if cache is None else f"it is not, or not whole, in the text cache {cache.uri}"
    return EmbeddingMissing(
        "a prompt is not encoded: run `ltx-batch encode JOB.yaml`, or set text: stage, then retry\n"
        f"{place}, and no text encoder is loaded: {text!r}"
    )
