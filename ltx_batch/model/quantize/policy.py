"""Precision: one frozen value, chosen by name, that says what each linear layer of a model becomes. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from ltx_batch.errors import PrecisionError

Quantized = Literal["int8", "int8-weight", "bnb-int8", "fp8"]

NAMES = ("fp32", "bf16", "int8", "int8-weight", "bnb-int8", "fp8")
HADAMARD_GROUPS = (0, 64, 256)
DEFAULT_HADAMARD_GROUP = 64
BLOCKS = "transformer_blocks"  # projections in and out, time and caption embedding lie outside, and stay as they are
# Keys and values of the prompt are computed once a clip: nothing is gained there, and Wan2.2 lost its prompts by it.
_KEPT = ("attn2.to_k", "attn2.to_v")
# One block in so many stays at each end, and no more than two: 0, 1, 46 and 47 of the 13B, as in Lightricks' own fp8 files.
# More buy what any block buys: of the demo, two of five take the error from 1.1 to 0.8 % (docs/precision.md).
_KEPT_SHARE, _KEPT_MOST = 14, 2


class Resolved(NamedTuple):
    """A precision by its real name, and why it is that one, in words."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Precision:
    """`dtype` holds everything that is not quantised; `quantize` names the way the linear layers of the blocks are.

    `skip` are patterns of further layers that stay as they are, each a dotted run of the layer's name: `ff.net.2`,
    `transformer_blocks.0`, `attn2.to_*`. `keep_blocks` is how many blocks stay at each end; None: one in fourteen, at most two.
    `hadamard_group` (int8 only) is how many inputs are mixed before they are rounded, 0 for none. `threshold` is
    bitsandbytes' outlier threshold (0 turns the decomposition off: with thousands of tokens nearly every column has an
    outlier, and is multiplied again in 16 bits; int8 rotates against outliers instead).
    """

    name: str
    dtype: Literal["float32", "bfloat16"]
    quantize: Quantized | None = None
    threshold: float = 0.0
    skip: tuple[str, ...] = ()
    hadamard_group: int = 0
    keep_blocks: int | None = None

    def table(self, layers: Iterable[str], *, blocks: str = BLOCKS) -> dict[str, str]:
        """What each of these linear layers becomes: fp32, bf16, or the way it is quantised.

        `layers` are all of a model's, by their dotted names; its blocks are `{blocks}.{number}`. Raises PrecisionError
        where nothing would be quantised, or a skip pattern matches no layer of the blocks.
        """
        names = list(layers)
        plain = "fp32" if self.dtype == "float32" else "bf16"
        if self.quantize is None:
            return dict.fromkeys(names, plain)
        inside = [name for name in names if name.startswith(f"{blocks}.")]
        self._check_patterns(inside)
        kept = (*_KEPT, *self.skip, *self._ends(inside, blocks))
        chosen = {name for name in inside if not any(matches(name, pattern) for pattern in kept)}
        if not chosen:
            raise PrecisionError(
                f"{self.name} would quantise nothing: {len(inside)} linear layers in the blocks, all skipped"
            )
        return {name: self.quantize if name in chosen else plain for name in names}

    @property
    def parked(self) -> tuple[str, ...]:
        """Patterns of layers that work once a clip, and wait in host memory beside a GPU."""
        return _KEPT if self.quantize == "int8" else ()

    def _ends(self, inside: list[str], blocks: str) -> list[str]:
        count = 1 + max((int(name[len(blocks) + 1 :].partition(".")[0]) for name in inside), default=-1)
        keep = min(count // _KEPT_SHARE, _KEPT_MOST) if self.keep_blocks is None else self.keep_blocks
        return [f"{blocks}.{number}" for number in range(count) if number < keep or number >= count - keep]

    def _check_patterns(self, inside: list[str]) -> None:
        for pattern in self.skip:
            if not any(matches(name, pattern) for name in inside):
                raise PrecisionError(
                    f"skip_modules: {pattern} matches no linear layer of the blocks; there are e.g. "
                    f"{', '.join(inside[:10])}"
                )


def matches(layer: str, pattern: str) -> bool:
    """Whether `pattern` covers whole dotted parts of `layer`: `blocks.1` is in `blocks.1.ff`, not in `blocks.10.ff`."""
    return fnmatchcase(f".{layer}.", f"*.{pattern}.*")


def resolve_name(name: str, device: str) -> str:
    """`auto` as a real name for `device` ("cpu", or anything else for a GPU) that was not timed; other names are checked.

    Raises PrecisionError for a name that is unknown.
    """
    if name == "auto":
        return "fp32" if device == "cpu" else "bf16"
    if name not in NAMES:
        close = difflib.get_close_matches(name, (*NAMES, "auto"), n=1)
        raise PrecisionError(
            f"unknown precision {name!r}{f', did you mean {close[0]}?' if close else ';'} "
            f"what works: auto, {', '.join(NAMES)}"
        )
    return name


def precision(
    name: str,
    device: str,
    *,
    threshold: float = 0.0,
    skip: tuple[str, ...] = (),
    hadamard_group: int | None = None,
    keep_blocks: int | None = None,
) -> Precision:
    """The policy of that name on that device. Raises PrecisionError as `resolve_name` does, or for an odd group."""
    name = resolve_name(name, device)
    # CPUs compute fp32 fastest and exactly, GPUs bf16: what int8 leaves alone follows the device.
    dtype: Literal["float32", "bfloat16"] = (
        "float32" if name == "fp32" or (name != "bf16" and device == "cpu") else "bfloat16"
    )
    if name == "fp32" or name == "bf16":
        return Precision(name, dtype)
    group = DEFAULT_HADAMARD_GROUP if hadamard_group is None else hadamard_group
    if group not in HADAMARD_GROUPS:
        raise PrecisionError(f"hadamard_group {group}: it must be one of {', '.join(map(str, HADAMARD_GROUPS))}")
    return Precision(
        name,
        dtype,
        quantize=name,  # type: ignore[arg-type] # NAMES without the first two
        threshold=threshold if name == "bnb-int8" else 0.0,
        skip=skip,
        hadamard_group=group if name == "int8" else 0,
        keep_blocks=keep_blocks,
    )
