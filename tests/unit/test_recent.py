"""Recent: bounded, and what is used stays."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from ltx_batch.recent import Recent


def test_what_was_not_used_for_longest_goes() -> None:
    recent: Recent[str, int] = Recent(2)
    recent["a"], recent["b"] = 1, 2
    assert recent["a"] == 1
    recent["c"] = 3
    assert dict(recent) == {"a": 1, "c": 3} and recent.get("b") is None and "b" not in recent
    recent["a"] = 4
    recent["d"] = 5
    assert dict(recent) == {"a": 4, "d": 5}
    del recent["a"]
    with pytest.raises(KeyError):
        recent["a"]


def test_threads_may_share_it() -> None:
    recent: Recent[int, int] = Recent(8)

    def use(number: int) -> int:
        recent[number % 32] = number
        return recent.get(number % 31, 0)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, range(4000)))
    assert len(recent) == 8
