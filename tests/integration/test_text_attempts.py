"""The text phase when something fails, and when nothing is left for it to find: on this process's own worker."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from job_runs import check_output, make_job, write_manifest

from ltx_batch import driver
from ltx_batch.admission import Admission
from ltx_batch.cli import main
from ltx_batch.driver import run
from ltx_batch.job import JobSpec
from ltx_batch.model.text import TextEncoder
from ltx_batch.model.text_key import TextIdentity, encoder_fingerprint
from ltx_batch.recipe import make_recipe
from ltx_batch.storage import Storage
from tests.tiny_checkpoint import write_tiny_checkpoint

PROMPTS = ["a red circle", "a blue square", "a green cross", "a white dot"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = "timesteps: [1.0, 0.7]\nguidance_scale: 1\n"
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), pipeline_config=config)


def staged(tiny: Path, folder: Path, prompts: list[str], **changes: Any) -> JobSpec:
    model = {"renderer": "ltx", "checkpoint": str(tiny)}
    settings = {"text": "stage", "defaults": {"num_frames": 9}, **changes}
    return make_job(write_manifest(folder, prompts), folder / "out", model=model, **settings)


def block(job: JobSpec, text: str) -> None:
    """Put a folder where the text's embedding is to lie."""
    fingerprint = encoder_fingerprint(make_recipe(job)["checkpoint"]["files"])
    key = TextIdentity(fingerprint, "float32").key(text)
    (Path(job.output) / "text" / key[:2] / f"{key}.safetensors").mkdir(parents=True)


@pytest.mark.parametrize("place", [(TextEncoder, "encode"), (Storage, "create")], ids=["encoder", "storage"])
def test_a_fault_that_passes_costs_an_attempt_and_nothing_else(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[type, str]
) -> None:
    owner, name = place
    right, faults = getattr(owner, name), [OSError("scripted: passing")] * 2

    def wrong(self: Any, what: str, *rest: Any) -> Any:
        if faults and (owner is TextEncoder or what.endswith(".safetensors")):
            raise faults.pop()
        return right(self, what, *rest)

    monkeypatch.setattr(owner, name, wrong)
    summary = run(staged(tiny, tmp_path, PROMPTS))
    assert (summary.exit_code, summary.ok) == (0, 4) and not faults
    assert summary.text is not None and summary.text["failed"] == 0
    assert summary.text["encoded"] + summary.text["cached"] == 4


def test_a_text_that_cannot_be_encoded_fails_its_row_alone(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = staged(tiny, tmp_path, PROMPTS)
    block(job, "a blue square")
    summary = run(job)
    assert (summary.exit_code, summary.ok, summary.failed) == (1, 3, 1)
    assert summary.text is not None
    assert {name: summary.text[name] for name in ("encoded", "cached", "failed")} == {
        "encoded": 3,
        "cached": 0,
        "failed": 1,
    }
    (failed,) = [line for line in check_output(job, summary.run).lines if line["ltx_status"] == "failed"]
    assert failed["prompt"] == "a blue square"
    assert "its rows will fail: 'a blue square': IsADirectoryError" in capsys.readouterr().err


def test_encode_tells_of_texts_that_failed_by_its_exit_code(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = staged(tiny, tmp_path, PROMPTS)
    block(job, "a blue square")
    file = tmp_path / "job.yaml"
    file.write_text(job.model_dump_json())
    assert main(["encode", str(file)]) == 1
    assert "3 texts encoded, 0 were in the cache, 1 failed" in capsys.readouterr().out


def test_a_phase_that_finds_nothing_new_hears_a_signal(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows have one prompt, which is in the cache: no text is handed out, and each shard takes its time."""
    prepare, prepared = Admission._prepare, []

    def slow(self: Admission, todo: Any, *rest: Any) -> Any:
        prepared.append(todo.shard.name)
        if len(prepared) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.15)
        return prepare(self, todo, *rest)

    monkeypatch.setattr(Admission, "_prepare", slow)
    summary = run(staged(tiny, tmp_path, ["a red circle"] * 40, shard_rows=1))
    assert (summary.exit_code, summary.ok) == (3, 0) and summary.stopped is not None
    assert "drained on a signal" in summary.stopped
    assert len(prepared) < 30


@pytest.mark.parametrize("open_rows", [12, 4])
def test_a_shard_is_prepared_once_for_text_and_render(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_rows: int
) -> None:
    """As many rows as may be open at once are kept in between."""
    prepare, prepared = Admission._prepare, Counter[str]()

    def count(self: Admission, todo: Any, *rest: Any) -> Any:
        prepared[todo.shard.name] += 1
        return prepare(self, todo, *rest)

    monkeypatch.setattr(Admission, "_prepare", count)
    monkeypatch.setattr(driver, "OPEN_ROWS", open_rows)
    job = staged(tiny, tmp_path, PROMPTS * 3, shard_rows=4)
    summary = run(job)
    assert (summary.exit_code, summary.ok) == (0, 12)
    check_output(job, summary.run)
    assert sorted(prepared.values()) == ([1, 1, 1] if open_rows == 12 else [1, 2, 2])
