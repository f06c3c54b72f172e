"""Kill a run at some moment, run the same command again, and look at what became of the output."""

from __future__ import annotations

import random
import time
from typing import Literal

from job_runs import Driver, Fault, Output, check_output, read_records, run_apart, until

from ltx_batch.job import JobSpec

Victim = Literal["driver", "actor", "cluster"]
ANY_MOMENT_S = 0.3  # a kill falls anywhere within this of the record that it waited for


def kill_and_finish(job: JobSpec, *kills: tuple[Victim, int]) -> None:
    """One run with each victim killed in turn once so many records are there, and then the same command again.

    `driver`: it alone, by SIGKILL. `actor`: the process of one. `cluster`: every process of the Ray that it started.
    """
    with Driver(job) as driver:
        for victim, records in kills:
            driver.commits(job, records)
            time.sleep(random.uniform(0, ANY_MOMENT_S))
            _kill(driver, victim)
        if kills[-1][0] == "actor":
            code, told = driver.result()
            assert (code, told["failed"]) == (0, 0), told
        until(lambda: not driver.named("gcs_server", "raylet", "ray::RenderActor"), timeout_s=20)
        finish(job)


def _kill(driver: Driver, victim: Victim) -> None:
    match victim:
        case "driver":
            driver.kill()
        case "actor":
            until(lambda: driver.named("ray::RenderActor"))[0].kill()
        case "cluster":
            for process in driver.named("gcs_server", "raylet", "ray::"):
                process.kill()
            code, told = driver.result()
            assert code == 3 and "cluster is gone" in told["stopped"], told


def fault_and_finish(job: JobSpec, fault: Fault) -> Output:
    """Kill the driver, which renders by itself, at the fault's moment."""
    code, _ = run_apart(job, fault=fault)
    assert code == -9 and fault.marker.exists()
    return finish(job)


def finish(job: JobSpec) -> Output:
    """Run again, without Ray to save its start: whatever was committed stays and is not rendered again."""
    before = read_records(job)
    code, told = run_apart(job.model_copy(update={"workers": 0}))
    assert (code, told["failed"]) == (0, 0), told
    output = check_output(job, told["run"])
    assert {key: record.attempt_id for key, record in before.items()}.items() <= output.attempt_ids().items()
    assert told["rendered"] == len(output.records) - len(before)
    code, told = run_apart(job)
    assert (code, told["rendered"], told["ray_loaded"]) == (0, 0, False), told
    return output
