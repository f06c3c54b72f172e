from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

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


def test_a_call_that_hangs_does_not_keep_the_process() -> None:
    code = (
        "import threading, time; from ltx_batch.one_thread import OneThread; one = OneThread('one');"
        "threading.Thread(target=one.call, args=(lambda: time.sleep(1000),), daemon=True).start(); time.sleep(0.2)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
