"""Whole runs on Ray: actors, their number and their share of the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from job_runs import Driver, check_output, ledger_of, make_job, ray_cluster, run_apart, until, write_manifest
from servers import S3Server

from ltx_batch.driver import run
from ltx_batch.errors import JobError
from ltx_batch.ray_pool import RayPool


@pytest.fixture(scope="module", autouse=True)
def cluster(s3_server: S3Server) -> Iterator[None]:
    with ray_cluster(num_cpus=2, num_gpus=1):
        yield


def test_actors_render_a_manifest(tmp_path: Path) -> None:
    """Two actors by the cluster's two CPUs; each is seen at work."""
    job = make_job(write_manifest(tmp_path, [f"p{i} [sleep 0.3]" for i in range(14)]), tmp_path / "out", workers="auto")
    summary = run(job)
    assert (summary.exit_code, summary.ok, summary.rendered) == (0, 14, 14)
    workers = {line["ltx_worker"] for line in check_output(job, summary.run).lines}
    pids = {int(worker.rpartition(":")[2]) for worker in workers}
    assert summary.workers == len(workers) == 2 and os.getpid() not in pids


@pytest.mark.parametrize(
    ("workers", "worker", "slots"),
    [
        ("auto", {}, 2),
        ("auto", {"num_cpus": 0.5}, 4),
        ("auto", {"num_cpus": 0.5, "num_gpus": 0.5}, 2),
        ("auto", {"num_gpus": 1}, 1),
        (3, {"num_gpus": 0.25}, 3),
    ],
)
def test_slots_follow_the_cluster_and_a_workers_share(
    tmp_path: Path, workers: Any, worker: dict[str, float], slots: int
) -> None:
    job = make_job(write_manifest(tmp_path, ["a"]), tmp_path / "out", workers=workers, worker=worker)
    assert len(RayPool(job).slots) == slots


@pytest.mark.parametrize(("worker", "name"), [({"num_gpus": 2}, "num_gpus"), ({"num_cpus": 3}, "num_cpus")])
def test_a_worker_that_fits_nowhere_is_refused(tmp_path: Path, worker: dict[str, float], name: str) -> None:
    job = make_job(write_manifest(tmp_path, ["a"]), tmp_path / "out", workers="auto", worker=worker)
    with pytest.raises(JobError, match=f"worker.{name} is"):
        run(job)


def test_half_a_gpu_each_makes_two_actors_of_one(tmp_path: Path) -> None:
    job = make_job(
        write_manifest(tmp_path, [f"p{i} [sleep 0.3]" for i in range(12)]),
        tmp_path / "out",
        workers="auto",
        worker={"num_gpus": 0.5},
    )
    summary = run(job)
    assert summary.exit_code == 0
    assert len({line["ltx_worker"] for line in check_output(job, summary.run).lines}) == 2


def test_batches_shapes_twins_and_priorities_at_once(tmp_path: Path) -> None:
    prompts = [f"p{i % 10}" for i in range(24)]
    columns = {"height": [32, 64, 32, 32] * 6, "priority": [i % 3 for i in range(24)], "seed": [7] * 24}
    job = make_job(write_manifest(tmp_path, prompts, **columns), tmp_path / "out", workers=2, batch_size=3)
    summary = run(job)
    output = check_output(job, summary.run)
    distinct = {(prompt, height) for prompt, height in zip(prompts, columns["height"], strict=True)}
    assert (summary.ok, summary.rendered, len(output.records)) == (24, len(distinct), len(distinct))
    assert {(line["prompt"], output.records[line["ltx_key"]].height) for line in output.lines} == distinct


def test_auto_precision_is_asked_of_an_actor(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, ["a"]), tmp_path / "out", workers=1)
    described = ledger_of(job).read_run(run(job).run)
    assert described is not None and described["precision"] == "fp32"


def test_an_object_store_is_written_by_actors(tmp_path: Path, s3_server: S3Server) -> None:
    job = make_job(write_manifest(tmp_path, [f"p{i}" for i in range(9)]), s3_server.uri(), workers=2)
    summary = run(job)
    assert (summary.exit_code, summary.rendered) == (0, 9)
    check_output(job, summary.run)
    assert run(job).rendered == 0


def test_two_drivers_share_a_cluster_and_a_run(tmp_path: Path) -> None:
    import ray

    job = make_job(write_manifest(tmp_path, [f"p{i} [sleep 0.1]" for i in range(12)]), tmp_path / "out", workers=1)
    address = ray.get_runtime_context().gcs_address
    with Driver(job, ray_address=address) as one, Driver(job, ray_address=address) as two:
        results = [one.result(), two.result()]
    assert [(code, told["ok"]) for code, told in results] == [(0, 12), (0, 12)]
    assert len(check_output(job, results[0][1]["run"]).records) == 12


def test_actors_are_gone_after_the_run_and_ray_stays(tmp_path: Path) -> None:
    import psutil
    import ray

    job = make_job(write_manifest(tmp_path, ["a", "b"]), tmp_path / "out", workers=1)
    summary = run(job)
    (worker,) = {line["ltx_worker"] for line in check_output(job, summary.run).lines}
    until(lambda: not psutil.pid_exists(int(worker.rpartition(":")[2])))
    assert ray.is_initialized(), "a Ray that was there before is left as it was"


@pytest.mark.slow
def test_a_local_output_is_refused_on_several_nodes(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        job = make_job(write_manifest(tmp_path, [f"p{i}" for i in range(4)]), tmp_path / "out", workers="auto")
        code, told = run_apart(job, ray_address=nodes.address)
        assert code == 2 and "the cluster has 2 nodes" in told["error"] and "--output s3://" in told["error"]
        assert not (tmp_path / "out" / "runs").exists()
    finally:
        nodes.shutdown()


def test_an_address_of_the_job_api_is_caught_with_a_hint(tmp_path: Path) -> None:
    job = make_job(write_manifest(tmp_path, ["a"]), tmp_path / "out", workers=1)
    code, told = run_apart(job, ray_address="http://127.0.0.1:8265")
    assert code == 2 and "--address http://127.0.0.1:8265" in told["error"]
