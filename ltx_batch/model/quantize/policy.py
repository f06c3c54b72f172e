"""Precision: one frozen value, chosen by name, that says in what numbers the model is held and computed."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from ltx_batch.errors import PrecisionError

BUILT = ("fp32", "bf16", "bnb-int8")
PLANNED = ("int8", "int8-weight", "fp8")


@dataclass(frozen=True, slots=True)
class Precision:
    """`dtype` holds everything that is not quantised; `quantize` names the way the transformer's blocks are.

    `threshold` is bitsandbytes' outlier threshold (0 turns the decomposition off: with thousands of tokens nearly
    every column has an outlier, and the decomposition only costs time). `skip` are patterns of linear layers that
    stay as they are, each a dotted run of the layer's name: `ff.net.2`, `transformer_blocks.0`, `attn2.to_*`.
    """

    name: str
    dtype: Literal["float32", "bfloat16"]
    quantize: Literal["bnb-int8"] | None = None
    threshold: float = 0.0
    skip: tuple[str, ...] = ()

    def keeps(self, layer: str) -> bool:
        """Whether the linear layer of this dotted name stays unquantised."""
        return any(matches(layer, pattern) for pattern in self.skip)


def matches(layer: str, pattern: str) -> bool:
    """Whether `pattern` covers whole dotted parts of `layer`: `blocks.1` is in `blocks.1.ff`, not in `blocks.10.ff`."""
    return fnmatchcase(f".{layer}.", f"*.{pattern}.*")


def resolve_name(name: str, device: str) -> str:
    """`auto` as a real name for `device` ("cpu", or anything else for a GPU); other names are checked.

    Raises PrecisionError for a name that is unknown or not built yet.
    """
    if name == "auto":
        return "fp32" if device == "cpu" else "bf16"
    if name in PLANNED:
        raise PrecisionError(f"precision {name} is not built yet; {_working()}")
    if name not in BUILT:
        close = difflib.get_close_matches(name, (*BUILT, "auto"), n=1)
        raise PrecisionError(
            f"unknown precision {name!r}{f', did you mean {close[0]}?' if close else ';'} {_working()}"
        )
    return name


def precision(name: str, device: str, *, threshold: float = 0.0, skip: tuple[str, ...] = ()) -> Precision:
    """The policy of that name on that device. Raises PrecisionError as `resolve_name` does."""
    name = resolve_name(name, device)
    # CPUs compute fp32 fastest and exactly, GPUs bf16: what int8 leaves alone follows the device.
    dtype: Literal["float32", "bfloat16"] = (
        "float32" if name == "fp32" or (name != "bf16" and device == "cpu") else "bfloat16"
    )
    if name == "bnb-int8":
        return Precision(name, dtype, quantize="bnb-int8", threshold=threshold, skip=skip)
    return Precision(name, dtype)


def _working() -> str:
    return f"what works: auto, {', '.join(BUILT)}"
