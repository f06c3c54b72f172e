"""Workers load what the run's recipe says, or nothing: weights that change between the driver's start and any load."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from job_runs import make_job, read_records, write_manifest

from ltx_batch import driver
from ltx_batch.driver import run
from ltx_batch.errors import CheckpointError
from ltx_batch.job import JobSpec
from ltx_batch.model import expected as expected_files
from ltx_batch.model.expected import Expected
from ltx_batch.model.sources import Sources
from ltx_batch.recipe import make_recipe
from ltx_batch.renderer import pinned
from ltx_batch.schedule import Task, WorkUnit
from ltx_batch.text_worker import TextWorker
from ltx_batch.worker import Worker, WorkerPlan
from tests.official_file import PLAIN, write_official_file, write_official_upsampler
from tests.tiny_checkpoint import write_tiny_checkpoint

CONFIG = "timesteps: [1.0, 0.7]\nguidance_scale: 2\n"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), pipeline_config=CONFIG)


@pytest.fixture
def tiny(shared: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return shutil.copytree(shared, tmp_path / "tiny")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def job_of(folder: Path, **changes: Any) -> JobSpec:
    model = {"renderer": "ltx", "checkpoint": str(folder / "tiny"), **changes.pop("model", {})}
    manifest = write_manifest(folder / "jobs", ["a red circle", "a blue square"])
    return make_job(manifest, folder / "out", model=model, defaults={"num_frames": 9}, **changes)


def plan_of(job: JobSpec, precision: str = "fp32") -> WorkerPlan:
    recipe = {**make_recipe(job), "precision": precision}
    return WorkerPlan(job, recipe, precision)


def spoil(file: Path) -> tuple[str, str]:
    """Change the last byte; returns the sha256 before and after."""
    before = file.read_bytes()
    after = before[:-1] + bytes([before[-1] ^ 1])
    file.write_bytes(after)
    return hashlib.sha256(before).hexdigest(), hashlib.sha256(after).hexdigest()


def unit_of(plan: WorkerPlan, prompt: str = "a red circle", **more: Any) -> WorkUnit:
    from ltx_batch.request import RenderRequest

    request = RenderRequest(prompt=prompt, height=32, width=32, num_frames=9, seed=1)
    return WorkUnit(0, (Task(request.key(plan.recipe), request, **more),))


@pytest.mark.parametrize(
    "name",
    [f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}", f"latent_upsampler/{WEIGHTS}", "text_encoder/model.safetensors"],
)
def test_a_worker_refuses_weights_that_changed_since_the_run_began(tiny: Path, tmp_path: Path, name: str) -> None:
    plan = plan_of(job_of(tmp_path))
    expected, found = spoil(tiny / name)
    with pytest.raises(CheckpointError) as refused:
        Worker(plan)
    for part in (str(tiny / name), found, expected):
        assert part in str(refused.value)


def test_weights_that_were_wrong_while_they_were_read_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that ends between the load and the hash."""
    sources = Sources(str(tiny))
    expected = Expected(sources.hashes(), sources)
    weights = tiny / "transformer" / WEIGHTS
    right, read, differs = weights.read_bytes(), threading.Event(), expected_files._differs
    spoil(weights)
    os.utime(weights, ns=(10**18, 10**18))
    monkeypatch.setattr(expected_files, "_differs", lambda *given: read.wait(60) and differs(*given))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} changed while they were read"), expected.weights():
        weights.write_bytes(right)
        read.set()


def test_weights_that_change_once_they_are_hashed_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = Sources(str(tiny))
    expected = Expected(sources.hashes(), sources)
    hashed, check = threading.Event(), Expected._check

    def told(self: Expected, *given: Any) -> None:
        check(self, *given)
        hashed.set()

    monkeypatch.setattr(Expected, "_check", told)
    with pytest.raises(CheckpointError, match=f"{WEIGHTS} has sha256"), expected.weights():
        assert hashed.wait(60)
        spoil(tiny / "transformer" / WEIGHTS)


def test_what_changed_is_told_before_what_came_of_it(tiny: Path, tmp_path: Path) -> None:
    """Hashes are taken while the files are read, and one that is no checkpoint any more cannot be."""
    plan = plan_of(job_of(tmp_path))
    weights = tiny / "transformer" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} has sha256"):
        Worker(plan)


def _drop_file(folder: Path) -> None:
    (folder / "tokenizer" / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "scheduler" / "scheduler_config.json").unlink()


def _add_file(folder: Path) -> None:
    (folder / "tokenizer" / "added_tokens.json").write_text("{}")


def _change_config(folder: Path) -> None:
    (folder / "pipeline_config.yaml").write_text("timesteps: [1.0]\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop_file, "scheduler/scheduler_config.json is missing"),
        (_add_file, "added_tokens.json is there, and the recipe has no such file"),
        (_change_config, "pipeline_config.yaml has sha256"),
    ],
)
def test_files_that_came_or_went_are_refused_too(
    tiny: Path, tmp_path: Path, change: Callable[[Path], None], said: str
) -> None:
    plan = plan_of(job_of(tmp_path))
    change(tiny)
    with pytest.raises(CheckpointError, match=said):
        Worker(plan)


def test_a_named_config_and_official_files_are_held_to_the_recipe(tiny: Path, tmp_path: Path) -> None:
    file = write_official_file(tiny, tmp_path / "ltx.safetensors", PLAIN)
    upsampler = write_official_upsampler(tiny, tmp_path / "up.safetensors")
    config = tmp_path / "named.yaml"
    config.write_text("timesteps: [1.0, 0.7]\n")
    names = {"checkpoint": file, "upsampler": upsampler, "text_encoder": tiny, "pipeline_config": config}
    plan = plan_of(job_of(tmp_path, model={name: str(place) for name, place in names.items()}))
    Worker(plan).close()
    config.write_text("# the same values, and a comment\ntimesteps: [1.0, 0.7]\n")
    Worker(plan).close()
    config.write_text("timesteps: [1.0, 0.6]\n")
    with pytest.raises(CheckpointError, match=r"named\.yaml"):
        Worker(plan)
    config.write_text("timesteps: [1.0, 0.7]\n")
    for place in (upsampler, file):
        spoil(place)
        with pytest.raises(CheckpointError, match=place.name):
            Worker(plan)


def test_a_run_over_changed_weights_ends_and_commits_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = driver.open_pool

    def replaced(job: JobSpec) -> Any:
        spoil(tiny / "transformer" / WEIGHTS)
        return opened(job)

    monkeypatch.setattr(driver, "open_pool", replaced)
    job = job_of(tmp_path)
    summary = run(job)
    assert summary.exit_code == 3 and summary.stopped is not None
    assert summary.stopped.startswith("no worker can start: CheckpointError")
    assert read_records(job) == {}


# what is loaded later than the renderer


def test_a_text_encoder_that_changed_before_its_first_use_fails_the_row(tiny: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path, text_cache=str(tmp_path / "text"))
    plan = plan_of(job)
    worker = Worker(plan)
    expected, found = spoil(tiny / "text_encoder" / "model.safetensors")
    (record,) = worker.run(unit_of(plan))
    worker.close()
    assert record.error_class == "CheckpointError" and record.error is not None
    assert found in record.error and expected in record.error
    assert not record.retryable and read_records(job) == {}
    assert not list((tmp_path / "text").rglob("*.safetensors"))


def test_a_text_worker_puts_nothing_of_another_encoder_into_the_cache(tiny: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path, text="stage")
    plan = plan_of(job)
    worker = TextWorker(plan)
    weights = tiny / "text_encoder" / "model.safetensors"
    spoil(weights)
    with pytest.raises(CheckpointError, match=r"text_encoder/model\.safetensors has sha256"):
        worker.encode(["a red circle"])
    worker.close()
    with pytest.raises(CheckpointError, match=r"text_encoder/model\.safetensors has sha256"):
        TextWorker(plan)
    assert not list((tmp_path / "out" / "text").rglob("*.safetensors"))
    spoil(weights)
    worker = TextWorker(plan)
    assert worker.encode(["a red circle"]).encoded == 1
    worker.close()


def test_the_second_try_without_quantisation_loads_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path, model={"precision": "int8", "keep_blocks": 0})
    plan = plan_of(job, "int8")
    worker = Worker(plan)
    expected, found = spoil(tiny / "transformer" / WEIGHTS)
    (record,) = worker.run(unit_of(plan, unquantised=True))
    worker.close()
    assert record.error_class == "CheckpointError" and record.error is not None
    assert found in record.error and expected in record.error


def test_a_worker_without_text_encoder_does_not_look_at_it(tiny: Path, tmp_path: Path) -> None:
    plan = plan_of(job_of(tmp_path, text="precomputed"))
    spoil(tiny / "text_encoder" / "model.safetensors")
    Worker(plan).close()


# the hub


def test_all_workers_load_the_commit_that_the_driver_saw(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = "1" * 40, "2" * 40
    repo = tmp_path / "hub" / "models--someone--tiny"
    for commit in (first, second):
        shutil.copytree(tiny, repo / "snapshots" / commit)
    spoil(repo / "snapshots" / second / "transformer" / WEIGHTS)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(first)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    job = job_of(tmp_path, model={"checkpoint": "someone/tiny"})
    told = job.model_copy(update={"model": pinned(job.model)})
    assert told.model.checkpoint == f"someone/tiny@{first}"
    (repo / "refs" / "main").write_text(second)
    assert make_recipe(told) == make_recipe(job_of(tmp_path))
    assert make_recipe(told) != make_recipe(job)
    Worker(plan_of(told)).close()
    opened = driver.open_pool
    seen: list[str | None] = []
    monkeypatch.setattr(driver, "open_pool", lambda job: (seen.append(job.model.checkpoint), opened(job))[1])
    assert run(job).ok == 2
    assert seen == [f"someone/tiny@{second}"]


def test_official_files_are_pinned_by_repository_and_commit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "3" * 40
    for repo, files in (("Lightricks--LTX-Video", "file"), ("PixArt-alpha--PixArt-XL-2-1024-MS", "folders")):
        snapshot = tmp_path / "hub" / f"models--{repo}" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(commit)
        if files == "file":
            write_official_file(tiny, snapshot / "ltxv-2b-0.9.8-distilled.safetensors", PLAIN)
        else:
            for name in ("text_encoder", "tokenizer"):
                shutil.copytree(tiny / name, snapshot / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    job = job_of(tmp_path, model={"checkpoint": "ltxv-2b-0.9.8-distilled"})
    told = pinned(job.model)
    assert told.checkpoint == f"Lightricks/LTX-Video@{commit}:ltxv-2b-0.9.8-distilled.safetensors"
    assert told.text_encoder == f"PixArt-alpha/PixArt-XL-2-1024-MS@{commit}"
    assert pinned(told) == told
    assert make_recipe(job.model_copy(update={"model": told})) == make_recipe(job)
    assert pinned(job_of(tmp_path, model={"checkpoint": "demo"}).model).checkpoint == "demo"
