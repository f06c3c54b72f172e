"""The schedule's rules, as tables: who gets what next, who is charged, and when it ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ltx_batch.costs import CostModel
from ltx_batch.job import AttemptPolicy
from ltx_batch.record import RenderRecord
from ltx_batch.request import RenderRequest
from ltx_batch.schedule import Breaker, Schedule, Task, cut_units


def task(key: str, *, height: int = 64, frames: int = 9, priority: int = 0, attempt: int = 1) -> Task:
    return Task(key, RenderRequest(prompt=key, height=height, width=64, num_frames=frames), priority, attempt)


def ok(key: str, render_s: float = 1.0) -> RenderRecord:
    return RenderRecord(key=key, status="ok", timings={"render": render_s})


def failed(key: str, *, retryable: bool = True) -> RenderRecord:
    return RenderRecord(key=key, status="failed", error_class="ValueError", error="bad", retryable=retryable)


class Bench:
    """A schedule with ready workers, a ledger that is a dict, and a clock that is a number."""

    def __init__(self, *workers: str, in_flight: int = 2, **policy: float) -> None:
        self.ledger: dict[str, RenderRecord] = {}
        self.schedule = Schedule(AttemptPolicy(**policy), self.ledger.get, in_flight=in_flight)
        self.now_s = 0.0
        for worker in workers or ("a",):
            self.schedule.started(worker)

    def next_keys(self, worker: str = "a") -> list[str] | None:
        unit = self.schedule.next(worker, self.now_s)
        return None if unit is None else [t.key for t in unit.tasks]

    def held(self, worker: str = "a") -> list[int]:
        return list(self.schedule._slots[worker].held)

    def finish(self, *records: RenderRecord, worker: str = "a"):
        return self.schedule.finished(worker, self.held(worker)[0], records, self.now_s)


def test_units_are_cut_by_batch_key_in_manifest_order() -> None:
    tasks = [task("a"), task("b", height=96), task("c"), task("d"), task("e", height=96)]
    assert [[t.key for t in unit.tasks] for unit in cut_units(tasks, 2)] == [["a", "c"], ["d"], ["b", "e"]]


def test_unit_ids_never_repeat() -> None:
    bench = Bench(in_flight=9)
    bench.schedule.add([task("a"), task("b")])
    bench.schedule.add([task("c")])
    ids = [bench.schedule.next("a", 0.0).id for _ in range(3)]
    assert len(set(ids)) == 3


def test_longest_predicted_goes_first_then_the_shape_stays_hot() -> None:
    bench = Bench(in_flight=4)
    bench.schedule.add([task("short1"), task("long1", height=512), task("short2"), task("long2", height=512)])
    assert [bench.next_keys() for _ in range(4)] == [["long1"], ["long2"], ["short1"], ["short2"]]


def test_a_worker_keeps_its_shape_although_a_longer_one_waits() -> None:
    bench = Bench(in_flight=3)
    bench.schedule.add([task("short1"), task("short2")])
    assert bench.next_keys() == ["short1"]
    bench.schedule.add([task("long", height=512)])
    assert [bench.next_keys(), bench.next_keys()] == [["short2"], ["long"]]


def test_priority_beats_shape_and_length() -> None:
    bench = Bench(in_flight=3)
    bench.schedule.add([task("low", height=512), task("first", priority=1), task("urgent", height=96, priority=5)])
    assert [bench.next_keys() for _ in range(3)] == [["urgent"], ["first"], ["low"]]


def test_priority_within_a_shape_keeps_the_manifests_order_among_equals() -> None:
    bench = Bench(in_flight=4)
    bench.schedule.add([task("p0"), task("p2a", priority=2), task("p1", priority=1), task("p2b", priority=2)])
    assert [bench.next_keys()[0] for _ in range(4)] == ["p2a", "p2b", "p1", "p0"]


def test_a_worker_holds_at_most_in_flight_units() -> None:
    bench = Bench(in_flight=2)
    bench.schedule.add([task("a"), task("b"), task("c")])
    assert [bench.next_keys() for _ in range(3)] == [["a"], ["b"], None]
    assert (bench.schedule.busy, bench.schedule.waiting) == (2, 1)


def test_a_worker_that_is_not_ready_gets_nothing() -> None:
    bench = Bench()
    bench.schedule.add([task("a")])
    bench.schedule.died("a", "preempted", "gone")
    assert bench.next_keys() is None


def test_ok_ends_a_row_and_teaches_the_cost_model() -> None:
    bench = Bench()
    bench.schedule.add([task("a")])
    bench.next_keys()
    verdict = bench.finish(ok("a", render_s=7.0))
    assert [record.key for record in verdict.records] == ["a"] and not verdict.attempts
    assert bench.schedule.costs.predict_s(task("x").request) == pytest.approx(7.0)


@pytest.mark.parametrize(("max_attempts", "tries"), [(1, 1), (2, 2), (3, 3)])
def test_a_row_that_raises_is_tried_again_up_to_the_limit(max_attempts: int, tries: int) -> None:
    bench = Bench(max_attempts=max_attempts)
    bench.schedule.add([task("a")])
    ended = []
    for _ in range(tries):
        assert not ended
        assert bench.next_keys() == ["a"]
        verdict = bench.finish(failed("a"))
        assert len(verdict.attempts) == 1 and verdict.attempts[0][1]["charged"]
        ended += verdict.records
    assert [(record.status, record.attempts) for record in ended] == [("failed", tries)]
    assert bench.next_keys() is None


def test_an_error_that_cannot_pass_is_not_retried() -> None:
    bench = Bench(max_attempts=5)
    bench.schedule.add([task("a")])
    bench.next_keys()
    assert bench.finish(failed("a", retryable=False)).records[0].attempts == 1


def test_a_batch_that_raised_runs_row_by_row_and_charges_nobody() -> None:
    bench = Bench(max_attempts=1)
    bench.schedule.add([task("good"), task("bad")], batch_size=2)
    assert bench.next_keys() == ["good", "bad"]
    verdict = bench.finish(failed("good"), failed("bad"))
    assert verdict.records == () and verdict.attempts == ()
    assert [bench.next_keys(), bench.next_keys()] == [["good"], ["bad"]]
    assert bench.finish(ok("good")).records[0].ok
    assert bench.finish(failed("bad")).records[0].attempts == 1


def test_a_hopeless_row_of_a_batch_ends_at_once_and_its_neighbours_keep_their_clips() -> None:
    bench = Bench()
    bench.schedule.add([task("good"), task("bad")], batch_size=2)
    bench.next_keys()
    verdict = bench.finish(ok("good"), failed("bad", retryable=False))
    assert [(record.key, record.ok) for record in verdict.records] == [("good", True), ("bad", False)]


def test_all_that_a_dead_worker_held_runs_alone_and_uncharged() -> None:
    bench = Bench("a", max_deaths=1)
    bench.schedule.add([task("x"), task("y")])
    bench.next_keys(), bench.next_keys()
    verdict = bench.schedule.died("a", "crash", "exit 3")
    assert verdict.records == () and [facts["charged"] for _, facts in verdict.attempts] == [False, False]
    bench.schedule.started("a")
    assert bench.next_keys() == ["x"]
    assert bench.next_keys() is None, "an alone unit shares its worker with none"
    bench.finish(ok("x"))
    assert bench.next_keys() == ["y"]


@pytest.mark.parametrize("max_deaths", [1, 2, 3])
def test_a_row_that_dies_alone_is_charged_and_given_up_at_the_limit(max_deaths: int) -> None:
    bench = Bench(max_deaths=max_deaths)
    bench.schedule.add([task("poison")])
    records: list[RenderRecord] = []
    for _ in range(max_deaths):
        assert bench.next_keys() == ["poison"]
        records += bench.schedule.died("a", "crash", "segfault").records
        bench.schedule.started("a")
    assert [(r.error_class, r.error) for r in records] == [("WorkerDied", "segfault")]


def test_a_hang_alone_ends_as_a_timeout() -> None:
    bench = Bench(max_deaths=1)
    bench.schedule.add([task("slow")])
    bench.next_keys()
    assert bench.schedule.died("a", "timeout", "too long").records[0].error_class == "RowTimeout"


def test_a_preempted_worker_costs_no_attempt_and_needs_no_solitude() -> None:
    bench = Bench(max_deaths=1)
    bench.schedule.add([task("x")])
    for _ in range(5):
        bench.next_keys()
        verdict = bench.schedule.died("a", "preempted", "spot")
        assert verdict.records == () and verdict.attempts == ()
        bench.schedule.started("a")
    unit = bench.schedule.next("a", 0.0)
    assert unit is not None and unit.tasks[0].attempt == 1 and not unit.alone


def test_ok_wins_over_a_death_that_came_after_the_commit() -> None:
    bench = Bench(max_deaths=1)
    bench.schedule.add([task("x")])
    bench.next_keys()
    bench.ledger["x"] = ok("x")
    verdict = bench.schedule.died("a", "crash", "after commit")
    assert [record.ok for record in verdict.records] == [True] and verdict.attempts == ()


def test_ok_wins_over_an_error_that_came_after_the_commit() -> None:
    bench = Bench(max_attempts=1)
    bench.schedule.add([task("x")])
    bench.next_keys()
    bench.ledger["x"] = ok("x")
    assert bench.finish(failed("x")).records[0].ok


def test_a_full_worker_is_kept_from_new_work_until_it_can_take_an_alone_unit() -> None:
    bench = Bench("a", "b")
    bench.schedule.add([task(f"x{i}") for i in range(8)])
    for worker in ("a", "a", "b", "b"):
        bench.next_keys(worker)
    bench.schedule.died("a", "crash", "boom")  # two alone units wait; b is full
    assert bench.next_keys("b") is None, "b runs dry for the alone unit"
    bench.finish(ok("x2"), worker="b")
    assert bench.next_keys("b") is None
    bench.finish(ok("x3"), worker="b")
    unit = bench.schedule.next("b", 0.0)
    assert unit is not None and unit.alone


def test_the_other_workers_go_on_while_one_runs_dry() -> None:
    bench = Bench("a", "b", "c")
    bench.schedule.add([task(f"x{i}") for i in range(12)])
    for worker in ("a", "a", "b", "b", "c", "c"):
        bench.next_keys(worker)
    bench.schedule.died("a", "crash", "boom")
    bench.finish(ok("x2"), worker="b")
    assert bench.next_keys("b") is None, "b is the one that runs dry"
    bench.finish(ok("x4"), worker="c")
    assert bench.next_keys("c") is not None


def test_a_slot_that_dies_too_often_without_an_ok_is_given_up() -> None:
    bench = Bench(max_worker_deaths=2)
    bench.schedule.failed_start("a")
    assert bench.schedule.may_restart("a") and not bench.schedule.stranded
    bench.schedule.failed_start("a")
    assert not bench.schedule.may_restart("a") and bench.schedule.stranded


def test_an_ok_render_clears_a_slots_deaths() -> None:
    bench = Bench(max_worker_deaths=2)
    bench.schedule.failed_start("a")
    bench.schedule.add([task("x")])
    bench.next_keys()
    bench.finish(ok("x"))
    bench.schedule.failed_start("a")
    assert bench.schedule.may_restart("a")


def test_rows_that_kill_alone_do_not_use_up_the_slot() -> None:
    bench = Bench(max_worker_deaths=2, max_deaths=1, in_flight=1)
    bench.schedule.add([task(f"poison{i}") for i in range(10)])
    for _ in range(10):
        bench.next_keys()
        bench.schedule.died("a", "crash", "boom")
        assert bench.schedule.may_restart("a")
        bench.schedule.started("a")


@pytest.mark.parametrize(
    ("timeout_s", "now_s", "overdue"),
    [(5.0, 4.0, []), (5.0, 6.0, ["a"]), (None, 3599.0, []), (None, 3601.0, ["a"])],
)
def test_a_worker_without_progress_is_overdue(timeout_s: float | None, now_s: float, overdue: list[str]) -> None:
    bench = Bench(timeout_s=timeout_s)
    bench.schedule.add([task("x")])
    bench.next_keys()
    assert bench.schedule.overdue(now_s) == overdue


def test_progress_resets_the_clock_of_what_waits_behind() -> None:
    bench = Bench(timeout_s=5)
    bench.schedule.add([task("x"), task("y")])
    bench.next_keys(), bench.next_keys()
    bench.now_s = 4.0
    bench.finish(ok("x"))
    assert bench.schedule.overdue(8.0) == [] and bench.schedule.overdue(9.5) == ["a"]


def test_an_idle_worker_is_never_overdue() -> None:
    assert Bench(timeout_s=1).schedule.overdue(1e9) == []


def test_learned_timeouts_follow_the_prediction_but_never_below_ten_minutes() -> None:
    bench = Bench()
    bench.schedule.costs.observe(task("x").request, 1.0)
    bench.schedule.add([task("x"), task("y", height=4096, frames=257)])
    bench.next_keys(), bench.next_keys()
    assert bench.schedule.overdue(599.0) == []
    bench.finish(ok("y"))
    assert bench.schedule.overdue(601.0) == ["a"]


def test_withdraw_forgets_what_waits_and_keeps_what_is_in_flight() -> None:
    bench = Bench(in_flight=1)
    bench.schedule.add([task("x"), task("y"), task("z")])
    bench.next_keys()
    assert bench.schedule.withdraw() == 2
    assert (bench.schedule.waiting, bench.schedule.busy) == (0, 1)


def test_what_was_measured_holds_for_other_values_of_guidance_and_is_bounded() -> None:
    costs, plain = CostModel(), replace(task("x").request, num_inference_steps=8)
    costs.observe(replace(plain, guidance_scale=3.0), 40.0)
    costs.observe(replace(plain, guidance_scale=1.0), 20.0)
    assert costs.predict_s(replace(plain, guidance_scale=7.5)) == pytest.approx(40.0)
    assert costs.predict_s(replace(plain, guidance_scale=1.0)) == pytest.approx(20.0)
    for width in range(32, 32 + 2 * 5000, 2):
        costs.observe(replace(plain, width=width), 1.0)
    assert len(costs._seconds_by_shape) == 4096


def test_predictions_scale_unseen_shapes_by_their_work() -> None:
    costs = CostModel()
    small, large = task("s").request, task("l", height=640).request
    costs.observe(small, 2.0)
    assert costs.predict_s(large) == pytest.approx(2.0 * CostModel.work(large) / CostModel.work(small))


@pytest.mark.parametrize(
    ("ok_rows", "failed_rows", "fraction", "trips"),
    [
        (0, 19, None, False),
        (0, 20, None, True),
        (1, 50, None, False),
        (50, 49, 0.1, False),
        (90, 10, 0.1, False),
        (89, 11, 0.1, True),
    ],
)
def test_the_breaker(ok_rows: int, failed_rows: int, fraction: float | None, trips: bool) -> None:
    assert bool(Breaker(20, fraction).tripped(ok_rows, failed_rows)) is trips


def test_numbers_that_overflow_are_rendered_without_quantisation_from_then_on() -> None:
    bench = Bench(max_attempts=4)
    bench.schedule.add([task("a")])
    asked = []
    for error_class in ("ValueError", "NotFinite", "ValueError", None):
        unit = bench.schedule.next("a", 0.0)
        assert unit is not None
        asked.append(unit.tasks[0].unquantised)
        bench.finish(ok("a") if error_class is None else replace(failed("a"), error_class=error_class))
    assert asked == [False, False, True, True]


def test_a_row_that_raised_goes_to_another_worker_first() -> None:
    bench = Bench("a", "b", in_flight=1)
    bench.schedule.add([task("x"), task("y")])
    assert [bench.next_keys("a"), bench.next_keys("b")] == [["x"], ["y"]]
    bench.finish(failed("x"), worker="a")
    assert bench.next_keys("a") is None, "x waits for b"
    bench.finish(ok("y"), worker="b")
    assert bench.next_keys("b") == ["x"]


def test_a_row_that_raised_everywhere_goes_to_anyone() -> None:
    bench = Bench("a", "b", in_flight=1)
    bench.schedule.add([task("x")])
    for worker in ("a", "b"):
        assert bench.next_keys(worker) == ["x"]
        bench.finish(failed("x"), worker=worker)
    assert bench.next_keys("a") == ["x"]


def test_one_sick_worker_does_not_fail_sound_rows() -> None:
    bench = Bench("sick", "well", in_flight=1, max_attempts=2)
    bench.schedule.add([task(f"x{i}") for i in range(40)])
    ended: list[RenderRecord] = []
    while bench.schedule.waiting or bench.schedule.busy:
        for _ in range(5):  # it fails fast, so it asks often
            if keys := bench.next_keys("sick"):
                ended += bench.finish(failed(keys[0]), worker="sick").records
        if keys := bench.next_keys("well"):
            ended += bench.finish(ok(keys[0]), worker="well").records
    assert len(ended) == 40 and all(record.ok for record in ended)


@pytest.mark.parametrize(("rows", "others_are_well", "sick"), [(7, True, False), (8, True, True), (8, False, False)])
def test_a_worker_on_which_row_after_row_raises_is_sick(rows: int, others_are_well: bool, sick: bool) -> None:
    bench = Bench(*(("a", "b") if others_are_well else ("a",)), in_flight=1)
    bench.schedule.add([task(f"x{i}") for i in range(rows)])
    for _ in range(rows):
        unit = bench.schedule.next("a", 0.0)
        assert unit is not None
        bench.finish(failed(unit.tasks[0].key), worker="a")
    assert bench.schedule.sick("a") is sick
