"""What `auto` becomes on a GPU: a decision from measured times, never from a table of GPUs. No torch."""

from __future__ import annotations

from collections.abc import Mapping

# From exact to less so. bf16 rounds by 0.2 % a layer, int8 by 1.2 %, fp8 by 3.6 % (tests/unit/test_quantize_numbers.py).
CANDIDATES = ("bf16", "int8", "fp8")
_WORTH = 1.05  # a less exact one must be faster by this, or timings decide by chance


def choose(times_s: Mapping[str, float], *, refused: Mapping[str, str] | None = None) -> tuple[str, str]:
    """The precision, and the reason in words.

    `times_s` are seconds of one transformer block by precision, of those that run; `refused` says why others do not.
    The fastest is taken, with its lead over each more exact one at least 5 %. Where bf16 was not timed it is bf16: nothing
    was faster than it.
    """
    refused = refused or {}
    if "bf16" not in times_s:
        return "bf16", f"it could not be timed ({refused.get('bf16', 'nothing was')})"
    chosen = "bf16"
    for name in CANDIDATES[1:]:
        if name in times_s and times_s[name] * _WORTH < times_s[chosen]:
            chosen = name
    told = [f"{name} {1000 * times_s[name]:.2f} ms" for name in CANDIDATES if name in times_s]
    told += [f"no {name} ({why})" for name, why in refused.items()]
    return chosen, f"one block takes {', '.join(told)}"
