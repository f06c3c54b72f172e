from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from ltx_batch.one_thread import OneThread


def test_all_calls_are_made_by_one_thread_one_at_a_time() -> None:
    one, inside, most = OneThread("one"), 0, 0

    def call() -> int:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        inside -= 1
        return threading.get_ident()

    with ThreadPoolExecutor(8) as callers:
        idents = set(callers.map(lambda _: one.call(call), range(200)))
    assert len(idents) == 1 and threading.get_ident() not in idents and most == 1


def test_what_a_call_raises_is_raised_and_the_next_one_is_made() -> None:
    one = OneThread("one")
    with pytest.raises(ZeroDivisionError):
        one.call(lambda: 1 / 0)
    assert one.call(lambda: 3) == 3


def test_what_failed_is_freed_with_its_error() -> None:
    class Tensor: ...

    one, alive = OneThread("one"), []

    def call() -> None:
        held = Tensor()
        alive.append(weakref.ref(held))
        raise ValueError

    gc.disable()
    try:
        with suppress(ValueError):
            one.call(call)
        assert alive[0]() is None
    finally:
        gc.enable()


def test_it_ends_after_the_calls_that_wait() -> None:
    before = threading.active_count()
    one = OneThread("one")
    assert threading.active_count() == before + 1 and one.call(lambda: 3) == 3
    one.close()
    deadline_s = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_a_call_that_hangs_does_not_keep_the_process() -> None:
    code = (
        "import threading, time; from ltx_batch.one_thread import OneThread; one = OneThread('one');"
        "threading.Thread(target=one.call, args=(lambda: time.sleep(1000),), daemon=True).start(); time.sleep(0.2)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
