"""How strong a LoRA was trained to be: alpha / rank of each layer, by what its file says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from ltx_batch.lora.names import diffusers_name

KEY = "lora_adapter_metadata"  # diffusers, loaders/lora_base.py


@dataclass(frozen=True, slots=True)
class ScaleRule:
    """What the metadata says, which is PEFT's LoraConfig (peft, tuners/lora/config.py). The rank is the tensors' own.

    A LoRA without alpha has scale 1, as in diffusers and ComfyUI.
    """

    alpha: float | None = None
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()
    use_rslora: bool = False

    @classmethod
    def parse(cls, metadata: Mapping[str, str], source: str) -> ScaleRule:
        """From a file's metadata. Raises ValueError where the entry is there and cannot be understood."""
        if KEY not in metadata:
            return cls()
        try:
            data = {diffusers_name(name): value for name, value in json.loads(metadata[KEY]).items()}
            alpha = data.get("lora_alpha")
            return cls(
                alpha=None if alpha is None else float(alpha),
                patterns=tuple((_ending(name), float(a)) for name, a in (data.get("alpha_pattern") or {}).items()),
                use_rslora=bool(data.get("use_rslora")),
            )
        except (ValueError, TypeError, AttributeError, re.error) as error:
            raise ValueError(f"{source}: its metadata {KEY} cannot be understood: {error}") from None

    def scale(self, module: str, rank: int) -> float:
        """What B @ A of a layer is multiplied by."""
        alpha = next((alpha for pattern, alpha in self.patterns if pattern.fullmatch(module)), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _ending(name: str) -> re.Pattern[str]:
    """A pattern names a whole module, or its end behind a dot (peft, utils/other.py, get_pattern_key)."""
    return re.compile(rf"(.*\.)?({name})")
