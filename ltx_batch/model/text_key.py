"""What names an embedding: its text and all that makes it, by content. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from ltx_batch.errors import CheckpointError

MAX_TOKENS = 256  # as the official pipeline encodes (pipeline_ltx_video.py, text_encoder_max_tokens)


@dataclass(frozen=True, slots=True)
class TextIdentity:
    """What an embedding hangs on beside its text: `encoder` is a fingerprint of files, `precision` a dtype's name."""

    encoder: str
    precision: str

    def key(self, text: str) -> str:
        """sha256 (hex) that names the embedding of `text`, which is taken as `as_encoded` gives it."""
        return _digest(
            {
                "text": as_encoded(text),
                "max_length": MAX_TOKENS,
                "encoder": self.encoder,
                "precision": self.precision,
            }
        )


def as_encoded(text: str) -> str:
    """Blanks at both ends are dropped and the rest is taken as written, as the official pipeline does
    (pipeline_ltx_video.py, _text_preprocessing)."""
    return text.strip()


def is_text(name: str) -> bool:
    """Whether a file of a checkpoint, named below it, is the text encoder's or the tokenizer's."""
    return name.partition("/")[0] in ("text_encoder", "tokenizer")


def encoder_fingerprint(files: Mapping[str, str]) -> str:
    """Hex sha256 of the text encoder and its tokenizer: of those files' names below the checkpoint and their sha256.

    `files` may hold the whole checkpoint's; where it lies does not count. Raises CheckpointError where there are none.
    """
    found = {name: sha256 for name, sha256 in files.items() if is_text(name)}
    if not found:
        raise CheckpointError(
            "the checkpoint has no text_encoder/ and tokenizer/, whose hashes name embeddings in a text cache; name a "
            "folder that has them as model.text_encoder, or set text: inline and no text_cache"
        )
    return _digest(found)


def _digest(value: Mapping[str, object]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
