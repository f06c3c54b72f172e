"""The text phase on Ray: actors of its own, gone before the others come."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from job_runs import make_job, ray_cluster, read_records, write_manifest

from ltx_batch import driver
from ltx_batch.driver import encode, run
from ltx_batch.job import JobSpec
from ltx_batch.model.text_key import TextIdentity, encoder_fingerprint
from ltx_batch.ray_text import TextCrew
from ltx_batch.recipe import make_recipe
from tests.tiny_checkpoint import write_tiny_checkpoint

PROMPTS = ["a red circle", "a blue square", "a red circle"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = "timesteps: [1.0, 0.7]\nguidance_scale: 2\n"
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), pipeline_config=config)


@pytest.fixture(scope="module", autouse=True)
def cluster(tiny: Path) -> Iterator[None]:
    with ray_cluster(num_cpus=2):
        yield


def staged(tiny: Path, folder: Path, prompts: list[str], **changes: Any) -> JobSpec:
    model = {"renderer": "ltx", "checkpoint": str(tiny)}
    settings = {"text": "stage", "workers": 1, "defaults": {"num_frames": 9}, **changes}
    output = settings.pop("output", folder / "out")
    return make_job(write_manifest(folder, prompts), output, model=model, **settings)


def actors(name: str) -> set[int]:
    """Processes of our cluster with this title."""
    found = set()
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{name}"):
                found.add(process.pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def test_an_actor_encodes_and_is_gone_before_one_renders(tiny: Path, tmp_path: Path) -> None:
    inline = make_job(
        write_manifest(tmp_path, PROMPTS),
        tmp_path / "inline",
        model={"renderer": "ltx", "checkpoint": str(tiny)},
        defaults={"num_frames": 9},
    )
    run(inline)
    seen: dict[str, set[int]] = {"text": set(), "both": set()}

    def look(told: Any) -> None:
        text, render = actors("TextActor"), actors("RenderActor")
        seen["text"] |= text
        seen["both"] |= text if render else set()

    job = staged(tiny, tmp_path, PROMPTS)
    summary = run(job, listen=look)
    assert (summary.ok, summary.rendered) == (3, 3) and summary.text is not None
    assert (summary.text["encoded"], summary.text["cached"]) == (3, 0)
    assert len(seen["text"]) == 1 and not seen["both"] and os.getpid() not in seen["text"]
    records = read_records(job)
    assert {record.ran["text"]["place"] for record in records.values()} == {"no text encoder"}
    frames = {key: record.frames_sha256 for key, record in read_records(inline).items()}
    assert {key: record.frames_sha256 for key, record in records.items()} == frames
    cache = str(tmp_path / "out" / "text")
    again = encode(staged(tiny, tmp_path, PROMPTS, output=tmp_path / "again", text_cache=cache))
    assert again.text is not None and (again.text["encoded"], again.text["cached"]) == (0, 3)


def test_many_texts_are_worth_another_actor(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    start = TextCrew._start
    monkeypatch.setattr("ltx_batch.ray_text._TEXTS_AN_ACTOR", 48)
    monkeypatch.setattr(TextCrew, "_start", lambda crew, number: (started.append(number), start(crew, number))[1])
    summary = encode(staged(tiny, tmp_path, [f"prompt {index}" for index in range(160)], workers=2))
    assert started == [0, 1] and summary.stopped is None
    assert summary.text is not None and summary.text["encoded"] == 161


def test_a_text_encoder_that_cannot_be_loaded_stops_the_run(tmp_path: Path) -> None:
    spoilt = write_tiny_checkpoint(tmp_path / "spoilt")
    weights = spoilt / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    summary = run(staged(spoilt, tmp_path, PROMPTS))
    assert summary.exit_code == 3 and summary.stopped is not None
    assert summary.stopped.startswith("prompts could not be encoded: CheckpointError")


def test_a_text_that_cannot_be_encoded_stops_no_other(tiny: Path, tmp_path: Path) -> None:
    """A folder lies where its embedding is to lie."""
    prompts = [f"prompt {index}" for index in range(40)]
    job = staged(tiny, tmp_path, prompts)
    fingerprint = encoder_fingerprint(make_recipe(job)["checkpoint"]["files"])
    key = TextIdentity(fingerprint, "float32").key(prompts[7])
    (tmp_path / "out" / "text" / key[:2] / f"{key}.safetensors").mkdir(parents=True)
    summary = encode(job)
    assert summary.stopped is None and summary.text is not None
    assert summary.text["failed"] == 1 and summary.text["encoded"] + summary.text["cached"] == 40


@pytest.mark.parametrize("text", ["stage", "inline"])
def test_weights_that_changed_since_the_run_began_end_it(
    tiny: Path, tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other try can help, so none is made."""
    changed = Path(shutil.copytree(tiny, tmp_path / "changed"))
    opened = driver.open_pool

    def replaced(job: JobSpec) -> Any:
        weights = changed / "text_encoder" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
        return opened(job)

    monkeypatch.setattr(driver, "open_pool", replaced)
    job = staged(changed, tmp_path, PROMPTS, text=text)
    summary = run(job)
    assert summary.exit_code == 3 and summary.stopped is not None
    assert "CheckpointError" in summary.stopped and "text_encoder/model.safetensors has sha256" in summary.stopped
    assert read_records(job) == {} and not list((tmp_path / "out" / "text").rglob("*.safetensors"))


@pytest.mark.parametrize("allowed", [2, 1])
def test_an_actor_that_dies_is_replaced_as_often_as_is_allowed(tiny: Path, tmp_path: Path, allowed: int) -> None:
    job = staged(tiny, tmp_path, [f"prompt {index}" for index in range(40)], attempts={"max_worker_deaths": allowed})
    killed: list[int] = []

    def kill_the_first(_: Any) -> None:
        for pid in actors("TextActor") if not killed else ():
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)

    summary = encode(job, listen=kill_the_first)
    assert len(killed) == 1
    if allowed == 1:
        assert summary.stopped is not None and summary.stopped.startswith("the text phase died too often")
    else:
        assert summary.stopped is None and summary.text is not None
        assert summary.text["encoded"] + summary.text["cached"] == 41
