"""The precision of the text encoder: a policy of its own, by name, beside the transformer's. No torch.

Embeddings decide pixels, so nothing but the job's own word changes them: `auto` is what files and transformer say, whatever
memory there is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ltx_batch.errors import PrecisionError
from ltx_batch.model.quantize.policy import Precision, precision
from ltx_batch.model.quantize.stored import Stored

BLOCKS = "encoder.block"  # T5's; embeddings and norms lie outside, or are no linear layers
# The way out of the gated feed-forward: what comes in has outliers far beyond all else in T5. transformers leaves it alone
# too, under every quantiser (T5PreTrainedModel._keep_in_fp32_modules).
KEPT = ("wo",)
DType = Literal["float32", "bfloat16"]
_PLAIN: dict[str, DType] = {"fp32": "float32", "bf16": "bfloat16"}


def text_policy(name: str, dtype: DType, device: str, stored: Stored | None = None) -> Precision:
    """The policy of that name. `dtype` is the transformer's, which holds what is not quantised; `device` is cpu, or anything
    else for a GPU. `auto`: as the files are `stored`, else all in `dtype`.

    Raises PrecisionError for a name that is unknown, or another than the files' own.
    """
    if name == "auto" and stored is None:
        return Precision(next(plain for plain, held in _PLAIN.items() if held == dtype), dtype)
    if stored is not None:
        try:
            chosen = stored.policy(stored.name if name == "auto" else name, device)
        except PrecisionError as error:
            raise PrecisionError(f"text_precision, of the text encoder: {error}") from None
    else:
        chosen = precision(name, device, skip=KEPT, keep_blocks=0)
    return replace(chosen, dtype=_PLAIN.get(name, dtype))


def embedding_precision(name: str, dtype: str) -> str:
    """What names the precision in an embedding's key. What files of their own say is in their hashes."""
    return dtype if name == "auto" else _PLAIN.get(name, f"{name} {dtype}")
