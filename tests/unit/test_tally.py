"""What a run says of itself: counts, exit code, cost."""

from __future__ import annotations

import json
import time

import pytest

from ltx_batch.record import RenderRecord
from ltx_batch.tally import Tally


def ok(**changes: object) -> RenderRecord:
    return RenderRecord(**{"key": "k", "status": "ok", "gpu_seconds": 2.0, **changes})  # type: ignore[arg-type]


def failed(error_class: str = "ValueError", error: str = "bad") -> RenderRecord:
    return RenderRecord(key="k", status="failed", error_class=error_class, error=error)


def test_rendered_and_gpu_seconds_are_of_this_call_and_reused_is_the_rest() -> None:
    tally = Tally("run", rows=10)
    tally.count_finished(ok=3, failed=1)
    for record in (ok(), ok(), ok(reused=True), failed()):
        tally.count(record)
    summary = tally.summary()
    assert (summary.ok, summary.failed, summary.rendered, summary.reused) == (6, 2, 2, 4)
    assert summary.gpu_seconds == 4.0 and tally.left == 2


@pytest.mark.parametrize(
    ("failed_rows", "stopped", "code"), [(0, None, 0), (1, None, 1), (0, "drained", 3), (2, "breaker", 3)]
)
def test_the_exit_code_says_how_it_ended(failed_rows: int, stopped: str | None, code: int) -> None:
    tally = Tally("run", rows=2)
    tally.count_finished(ok=2 - failed_rows, failed=failed_rows)
    assert tally.summary(stopped=stopped).exit_code == code


@pytest.mark.parametrize(("price", "cost"), [(None, None), (0.0, 0.0), (3.6, 0.002)])
def test_cost_needs_a_price(price: float | None, cost: float | None) -> None:
    tally = Tally("run", rows=1, gpu_hour_price=price)
    tally.count(ok())
    assert tally.summary().cost == cost


def test_the_commonest_errors_come_first_by_class_and_first_line() -> None:
    tally = Tally("run", rows=10)
    for record in (failed("A", "one\nplace 1"), failed("A", "one\nplace 2"), failed("B", "x" * 500)):
        tally.count(record)
    (first, count), (second, _) = tally.summary().top_errors
    assert (first, count) == ("A: one", 2) and second.startswith("B: xxx") and len(second) == 160


def test_rows_that_were_skipped_on_purpose_are_failed_but_no_reason_to_stop() -> None:
    tally = Tally("run", rows=4)
    tally.count_finished(ok=0, failed=1)
    tally.count(failed("InvalidRow"), skipped=True)
    tally.count(failed("InvalidRow"))
    assert (tally.failed, tally.tried_in_vain) == (3, 1)


def test_kinds_of_errors_are_counted_together_beyond_a_thousand() -> None:
    tally = Tally("run", rows=5000)
    for row in range(3000):
        tally.count(failed("MediaError", f"/media/{row}.png does not exist"))
    assert len(tally.errors) == 1001 and tally.errors["other errors"] == 2000


def test_the_rate_counts_from_the_first_clip_and_gives_the_time_that_is_left() -> None:
    tally = Tally("run", rows=100)
    tally.count(ok())
    assert (tally.summary().rows_per_s, tally.summary().eta_s) == (0.0, None), "one clip is no rate"
    tally.first_s = time.monotonic() - 10
    for _ in range(20):
        tally.count(ok())
    summary = tally.summary()
    assert summary.rows_per_s == pytest.approx(2.0, rel=0.05)
    assert summary.eta_s == pytest.approx(79 / 2, rel=0.05)


def test_the_first_ready_worker_is_the_one_that_counts() -> None:
    tally = Tally("run", rows=1)
    tally.worker_ready()
    first = tally.ready_s
    time.sleep(0.01)
    tally.worker_ready()
    assert tally.ready_s == first is not None


def test_a_summary_is_json_material() -> None:
    told = Tally("run", rows=1).summary(stopped="why").as_dict()
    assert json.loads(json.dumps(told))["stopped"] == "why"
    assert {"run", "rows", "ok", "failed", "rendered", "reused", "seconds", "gpu_seconds", "cost"} <= told.keys()
