"""Each kind of kill, at several moments, on local disk and on an S3 server: `make test-slow`."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from job_runs import Driver, Fault, check_output, ledger_of, make_job, read_records, run_apart, until, write_manifest
from kills import Victim, fault_and_finish, finish, kill_and_finish
from servers import S3Server

pytestmark = pytest.mark.slow
ROWS = 16


def rows(sleep_s: float = 0.15) -> list[str]:
    return [f"p{i} [sleep {sleep_s}]" for i in range(ROWS)]


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path, s3_server: S3Server) -> str:
    return s3_server.uri() if request.param == "s3" else str(tmp_path / "out")


@pytest.mark.parametrize(
    ("victim", "records"), [("driver", 1), ("driver", 11), ("actor", 1), ("actor", 11), ("cluster", 8)]
)
def test_a_kill_at_any_moment_loses_nothing(tmp_path: Path, output: str, victim: Victim, records: int) -> None:
    job = make_job(write_manifest(tmp_path, rows(0.2)), output, workers=2)
    kill_and_finish(job, (victim, records))


@pytest.mark.parametrize(
    ("operation", "name", "when", "nth"),
    [
        ("create", r"run\.json$", "before", 1),
        ("replace", r"status\.json$", "before", 1),
        ("upload", r"\.mp4$", "after", 9),
        ("create", r"videos/.*\.json$", "before", ROWS),
        ("create", r"videos/.*\.json$", "after", 5),
        ("create", r"shards/", "before", 1),
        ("create", r"shards/", "after", 3),
    ],
)
def test_a_kill_at_an_exact_moment_loses_nothing(
    tmp_path: Path, s3_server: S3Server, operation: str, name: str, when: str, nth: int
) -> None:
    job = make_job(write_manifest(tmp_path, [f"p{i}" for i in range(ROWS)]), s3_server.uri())
    fault_and_finish(job, Fault(operation, name, tmp_path / "marker", when, nth))


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_actor_that_is_killed_around_its_commit_charges_nobody(tmp_path: Path, output: str, when: str) -> None:
    """Between video and record, and between record and answer."""
    job = make_job(write_manifest(tmp_path, rows(0.05)), output, workers=2, attempts={"max_attempts": 1})
    code, told = run_apart(job, fault=Fault("create", r"videos/.*\.json$", tmp_path / "marker", when, 2))
    assert (code, told["ok"], told["failed"]) == (0, ROWS, 0) and (tmp_path / "marker").exists()
    assert {line["ltx_attempts"] for line in check_output(job, told["run"]).lines} == {1}


def test_a_lost_node_charges_nobody(tmp_path: Path, s3_server: S3Server) -> None:
    """As a preempted spot machine: its rows go to the others, and no attempt is written down."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        doomed = nodes.add_node(num_cpus=1)
        job = make_job(write_manifest(tmp_path, rows(1.0)), s3_server.uri(), workers=2, attempts={"max_attempts": 1})
        with Driver(job, ray_address=nodes.address) as driver:
            until(lambda: len({record.worker for record in read_records(job).values()}) == 2)
            nodes.remove_node(doomed, allow_graceful=False)
            code, told = driver.result(120)
        assert (code, told["ok"]) == (0, ROWS), told
        check_output(job, told["run"])
        assert not ledger_of(job).attempts(told["run"])
    finally:
        nodes.shutdown()


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_stops_actors_at_once(tmp_path: Path, number: signal.Signals, expected: int) -> None:
    output = str(tmp_path / "out")
    slow = [f"p{i} [sleep {30 if i >= 4 else 0.1}]" for i in range(8)]
    job = make_job(write_manifest(tmp_path, slow, priority=list(range(8, 0, -1))), output, workers=2)
    with Driver(job) as driver:
        driver.commits(job, 4)
        driver.signal(number)
        until(lambda: '"draining": true' in (driver.process.stdout.readline() if driver.process.stdout else ""))
        driver.signal(number)
        assert driver.process.wait(timeout=10) == expected
        until(lambda: not driver.named("gcs_server", "raylet", "ray::RenderActor"), timeout_s=20)
    mended = job.model_copy(update={"manifest": write_manifest(tmp_path / "mended", [row[:2] for row in slow])})
    finish(mended)
