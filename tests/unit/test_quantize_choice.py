"""What `auto` becomes, from measured times."""

from __future__ import annotations

import pytest

from ltx_batch.model.quantize.choose import choose


@pytest.mark.parametrize(
    ("times_ms", "chosen"),
    [
        ({"bf16": 15.9, "int8": 12.0, "fp8": 12.4}, "int8"),
        ({"bf16": 15.9, "int8": 12.0, "fp8": 11.5}, "int8"),  # not worth three times the error
        ({"bf16": 15.9, "int8": 12.0, "fp8": 11.0}, "fp8"),
        ({"bf16": 15.9, "int8": 15.5, "fp8": 11.0}, "fp8"),
        ({"bf16": 15.9, "int8": 15.5, "fp8": 15.4}, "bf16"),
        ({"bf16": 8.0, "int8": 30.0, "fp8": 5.0}, "fp8"),  # where int8 is emulated
        ({"bf16": 8.0, "int8": 4.0}, "int8"),  # where there is no fp8
        ({"bf16": 8.0}, "bf16"),
    ],
)
def test_the_fastest_is_taken_if_it_is_worth_its_error(times_ms: dict[str, float], chosen: str) -> None:
    assert choose({name: ms / 1000 for name, ms in times_ms.items()})[0] == chosen


def test_the_reason_has_all_times_and_refusals() -> None:
    _, reason = choose({"bf16": 0.0159, "int8": 0.012}, refused={"fp8": "compute capability 8.6"})
    assert reason == "one block takes bf16 15.90 ms, int8 12.00 ms, no fp8 (compute capability 8.6)"
