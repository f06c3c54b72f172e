"""A worker with two units in hand: what waits for what, and what a fault of one leaves."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from job_runs import make_job, write_manifest

from ltx_batch import worker as worker_module
from ltx_batch.clip import Clip
from ltx_batch.errors import EncodeError
from ltx_batch.fake import FakeRenderer, write_fake_video
from ltx_batch.record import RenderRecord
from ltx_batch.request import RenderRequest
from ltx_batch.schedule import Task, WorkUnit
from ltx_batch.worker import Worker, WorkerPlan


class Told(FakeRenderer):
    """Tells what happens when. The first render ends once the second one waits for its turn."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.told, self.both = device, list[str](), threading.Barrier(2)

    def prepare(self, request: RenderRequest) -> RenderRequest:
        if request.prompt == "second":
            self.both.wait(30)
        return request

    def render(self, requests: Sequence[RenderRequest], *, unquantised: bool = False) -> list[Clip]:
        if requests[0].prompt == "first":
            self.both.wait(30)
        clips = super().render(requests, unquantised=unquantised)
        self.told += [f"render {request.prompt}" for request in requests]
        return clips


def run_both(folder: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> tuple[list[str], list[RenderRecord]]:
    """What a worker on that device did with two units, and their records."""
    job = make_job(write_manifest(folder, ["unused"]), folder / "out", video={"codec": "fake"})
    renderer = Told(device)

    def encode(clip: Clip, target: Path) -> None:
        renderer.told.append(f"encode {target.stem}")
        if target.stem == "bad":
            raise EncodeError("scripted")
        write_fake_video(clip, target)

    monkeypatch.setattr(worker_module, "open_renderer", lambda plan: renderer)
    monkeypatch.setattr(worker_module, "write_fake_video", encode)
    worker = Worker(WorkerPlan(job, {}, "fp32"))
    sizes = {"height": 64, "width": 64, "num_frames": 9}
    first = [Task(key, RenderRequest(prompt="first", **sizes)) for key in ("bad", "good")]
    second = [Task("second", RenderRequest(prompt="second", **sizes))]
    with ThreadPoolExecutor(2) as pool:
        records = list(pool.map(worker.run, [WorkUnit(0, tuple(first)), WorkUnit(1, tuple(second))]))
    worker.close()
    return renderer.told, [record for unit in records for record in unit]


def test_on_a_cpu_a_unit_is_rendered_and_encoded_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, _ = run_both(tmp_path, monkeypatch, "cpu")
    assert told == ["render first", "render first", "encode bad", "encode good", "render second", "encode second"]


@pytest.mark.parametrize("device", ["cpu", "a GPU"])
def test_a_clip_that_cannot_be_encoded_is_tried_once_and_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    told, records = run_both(tmp_path, monkeypatch, device)
    assert told.count("encode bad") == 1
    assert [(record.key, record.status) for record in records] == [("bad", "failed"), ("good", "ok"), ("second", "ok")]
    assert records[0].error_class == "EncodeError" and records[2].timings["encode"] > 0


def test_without_room_for_scratch_rows_fail_and_the_worker_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker_module, "_scratch", full)
    job = make_job(write_manifest(tmp_path, ["unused"]), tmp_path / "out", video={"codec": "fake"})
    worker = Worker(WorkerPlan(job, {}, "fp32"))
    tasks = tuple(Task(key, RenderRequest(prompt=key, height=64, width=64, num_frames=9)) for key in ("one", "two"))
    records = worker.run(WorkUnit(0, tasks))
    worker.close()
    assert {(record.status, record.error_class) for record in records} == {("failed", "OSError")}
