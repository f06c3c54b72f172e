"""What a checkpoint's files say of a transformer that is quantised already. No torch.

Our own files say it in their metadata; bitsandbytes' (diffusers, `save_pretrained` of an 8-bit model) by their tensors'
names: `X.weight` int8, `X.SCB` the largest of each row, `X.weight_format`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ltx_batch.errors import CheckpointError, PrecisionError
from ltx_batch.model.quantize.policy import Precision, precision
from ltx_batch.tensor_file import QUANTIZED_KEY

_FORMAT = 1
BNB_SCALE = ".SCB"


@dataclass(frozen=True, slots=True)
class Stored:
    """The precision by name, and how its policy was bent. `source` is {file: sha256} of the weights it was made from."""

    name: str
    hadamard_group: int = 0
    skip: tuple[str, ...] = ()
    keep_blocks: int | None = None
    source: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, policy: Precision, source: Mapping[str, str]) -> Stored:
        return cls(policy.name, policy.hadamard_group, policy.skip, policy.keep_blocks, source)

    def metadata(self) -> dict[str, str]:
        """For the header of a .safetensors file."""
        told = {
            "format": _FORMAT,
            "precision": self.name,
            "hadamard_group": self.hadamard_group,
            "skip_modules": list(self.skip),
            "keep_blocks": self.keep_blocks,
            "source": dict(self.source),
        }
        return {"format": "pt", QUANTIZED_KEY: json.dumps(told)}

    def policy(
        self,
        name: str,
        device: str,
        *,
        threshold: float = 0.0,
        skip: tuple[str, ...] = (),
        hadamard_group: int | None = None,
        keep_blocks: int | None = None,
    ) -> Precision:
        """The policy that these weights can be used by; arguments as of `precision`, of which the threshold alone is free.

        Raises PrecisionError where another one is asked for: weights cannot be rounded twice.
        """
        wrong = [
            f"{what} {asked!r} (it has {held!r})"
            for what, asked, held in (
                ("precision", name, self.name),
                ("skip_modules", skip or self.skip, self.skip),
                (
                    "hadamard_group",
                    self.hadamard_group if hadamard_group is None else hadamard_group,
                    self.hadamard_group,
                ),
                ("keep_blocks", self.keep_blocks if keep_blocks is None else keep_blocks, self.keep_blocks),
            )
            if asked != held
        ]
        if wrong:
            raise PrecisionError(
                f"this checkpoint is quantised already, and cannot be used with {', '.join(wrong)}: leave that out "
                "(precision auto takes what is there), or name the original checkpoint"
            )
        return precision(
            self.name,
            device,
            threshold=threshold,
            skip=self.skip,
            hadamard_group=self.hadamard_group,
            keep_blocks=self.keep_blocks,
        )


def stored_form(names: Iterable[str], metadata: Mapping[str, str], source: str) -> Stored | None:
    """What the files with these tensors and this metadata hold; None where nothing is quantised. Raises CheckpointError."""
    if QUANTIZED_KEY in metadata:
        return _parse(metadata[QUANTIZED_KEY], source)
    return Stored("bnb-int8") if any(name.endswith(BNB_SCALE) for name in names) else None


def _parse(text: str, source: str) -> Stored:
    try:
        told: dict[str, Any] = json.loads(text)
        if told["format"] != _FORMAT:
            raise CheckpointError(
                f"{source} was quantised in format {told['format']}, and this version reads {_FORMAT}: quantise it again"
            )
        group, keep = int(told["hadamard_group"]), told["keep_blocks"]
        return Stored(str(told["precision"]), group, tuple(told["skip_modules"]), keep, dict(told["source"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{source}: what its metadata says of its quantisation cannot be read: {error}") from None
