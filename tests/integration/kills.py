"""Kill a run at some moment, run the same command again, and look at what became of the output."""

from __future__ import annotations

from job_runs import Driver, Fault, Output, check_output, read_records, run_apart, until

from ltx_batch.job import JobSpec

CLUSTER = ("gcs_server", "raylet", "ray::")


def kill_and_finish(job: JobSpec, victim: str, *, after_records: int) -> None:
    """SIGKILL the driver alone, one actor's process, or every process of the Ray that the driver started."""
    with Driver(job) as driver:
        driver.commits(job, after_records)
        match victim:
            case "driver":
                driver.kill()
            case "actor":
                driver.named("ray::RenderActor")[0].kill()
                code, told = driver.result()
                assert (code, told["failed"]) == (0, 0)
            case "cluster":
                for process in driver.named(*CLUSTER):
                    process.kill()
                code, told = driver.result()
                assert code == 3 and "cluster is gone" in told["stopped"]
        until(lambda: not driver.named(*CLUSTER[:2], "ray::RenderActor"), timeout_s=20)
        finish(job)


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
