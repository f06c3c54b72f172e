"""Clips with LoRA files: through the renderer, the command line, and whole runs in this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from job_runs import check_output, make_job, write_manifest
from lora_files import COMFYUI, random_pairs, write_lora
from safetensors.torch import load_file, save_file
from servers import S3Server

from ltx_batch import LoraRef, RenderRequest, load_renderer
from ltx_batch.cli import main
from ltx_batch.clip import Clip
from ltx_batch.driver import RunOptions, run
from ltx_batch.errors import CheckpointError, JobError, LoraError, ManifestError
from ltx_batch.media import read_media
from ltx_batch.renderer import LtxRenderer
from ltx_batch.request import parse_lora
from ltx_batch.storage import Storage
from tests.tiny_checkpoint import write_tiny_checkpoint

CONFIG = "timesteps: [1.0, 0.975, 0.4219]\nguidance_scale: 1\n"
REQUEST = RenderRequest(prompt="a red circle", height=64, width=96, num_frames=9, seed=7)
SMALL: dict[str, Any] = {"height": 64, "width": 64, "num_frames": 1, "frame_rate": 8}
ROW = RenderRequest(prompt="p", **SMALL)
SHAPES = {
    "proj_out": (8, 32),
    "transformer_blocks.0.attn1.to_q": (32, 32),
    "transformer_blocks.1.attn2.to_out.0": (32, 32),
    "transformer_blocks.1.ff.net.2": (32, 128),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), pipeline_config=CONFIG)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    write_lora(folder / "style.safetensors", random_pairs(SHAPES, size=0.5))
    write_lora(folder / "motion.safetensors", random_pairs(SHAPES, seed=1, size=0.5), COMFYUI)
    write_lora(folder / "foreign.safetensors", random_pairs({"transformer_blocks.27.attn1.to_q": (32, 32)}))
    return folder


@pytest.fixture(scope="module")
def renderer(tiny: Path) -> Iterator[LtxRenderer]:
    loaded = load_renderer(str(tiny), device="cpu")
    yield loaded
    loaded.close()


def loras(files: Path, *named: str) -> tuple[LoraRef, ...]:
    return tuple(LoraRef(files / f"{name}.safetensors", 0.8) for name in named)


def one(renderer: LtxRenderer, *named: LoraRef, **changes: Any) -> Clip:
    return renderer.render([replace(REQUEST, loras=named, **changes)])[0]


# the renderer


def test_a_lora_changes_the_clip_and_the_record_tells(renderer: LtxRenderer, files: Path) -> None:
    plain, styled = one(renderer), one(renderer, *loras(files, "style"))
    assert (plain.frames != styled.frames).mean() > 0.05
    assert "loras" not in plain.ran and "lora" not in plain.timings
    digest = hashlib.sha256((files / "style.safetensors").read_bytes()).hexdigest()
    assert styled.ran["loras"] == {
        "files": [{"sha256": digest, "weight": float(np.float32(0.8))}],
        "fused_layers": 4,
        "applied_layers": 0,
    }
    assert styled.timings["lora"] > 0


def test_a_lora_is_a_checkpoint_with_the_sum_in_its_weights(
    renderer: LtxRenderer, tiny: Path, files: Path, tmp_path: Path
) -> None:
    """Written to disk by the formula and loaded without any LoRA, it gives the same clip."""
    for name in ("vae", "text_encoder", "tokenizer", "scheduler", "pipeline_config.yaml"):
        (tmp_path / name).symlink_to(tiny / name)
    (tmp_path / "transformer").mkdir()
    place = Path("transformer", "diffusion_pytorch_model.safetensors")
    weights, lora = load_file(tiny / place), load_file(files / "style.safetensors")
    for name in SHAPES:
        down, up = (lora[f"transformer.{name}.lora_{half}.weight"].double() for half in "AB")
        weights[f"{name}.weight"] = (weights[f"{name}.weight"].double() + 0.8 * up @ down).float()
    save_file(weights, tmp_path / place)
    (tmp_path / "transformer" / "config.json").symlink_to(tiny / "transformer" / "config.json")
    merged = load_renderer(str(tmp_path), device="cpu")
    expected, found = one(merged), one(renderer, *loras(files, "style"))
    merged.close()
    assert np.abs(expected.frames.astype(int) - found.frames).max() <= 1


def test_rows_of_a_batch_equal_the_rows_alone(renderer: LtxRenderer, files: Path) -> None:
    set_ = loras(files, "style", "motion")
    requests = [replace(REQUEST, seed=seed, prompt=f"row {seed}", loras=set_) for seed in (1, 2)]
    together = renderer.render(requests)
    renderer.render([REQUEST])
    for request, clip in zip(requests, together, strict=True):
        (alone,) = renderer.render([request])
        assert np.abs(alone.frames.astype(int) - clip.frames).max() <= 1
        assert (alone.frames != clip.frames).mean() < 1e-3


def test_switching_back_and_forth_gives_the_same_bits(renderer: LtxRenderer, files: Path) -> None:
    sets = [(), ("style",), ("motion",), ("style", "motion"), ("motion", "style")]
    first = [one(renderer, *loras(files, *names)).frames_sha256() for names in sets]
    again = [one(renderer, *loras(files, *names)).frames_sha256() for names in reversed(sets)]
    assert first == list(reversed(again))
    assert len(set(first)) == 4 and first[3] == first[4]
    assert one(renderer, LoraRef("never-read.safetensors", 0.0)).frames_sha256() == first[0]


def test_other_sets_are_not_one_batch(renderer: LtxRenderer, files: Path) -> None:
    with pytest.raises(ValueError, match="batch_key"):
        renderer.render([REQUEST, replace(REQUEST, loras=loras(files, "style"))])


def test_a_trace_has_them_too(renderer: LtxRenderer, files: Path) -> None:
    request = replace(REQUEST, loras=loras(files, "style"))
    plain, styled = renderer.trace(REQUEST), renderer.trace(request)
    assert (plain.first_pass - styled.first_pass).norm() > 0.05 * plain.first_pass.norm()
    assert torch.equal(renderer.trace(REQUEST).first_pass, plain.first_pass)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoraRef("gone.safetensors"), "there is no file gone.safetensors"),
        (LoraRef("foreign.safetensors"), r"transformer_blocks\.27\.attn1\.to_q; it has e\.g\. proj_in"),
        (LoraRef("style.safetensors", 1.0, "ab" * 32), "it changed after it was hashed"),
    ],
)
def test_a_file_that_cannot_be_used_fails_its_row_and_no_other(
    renderer: LtxRenderer, files: Path, monkeypatch: pytest.MonkeyPatch, lora: LoraRef, message: str
) -> None:
    monkeypatch.chdir(files)
    plain = one(renderer).frames_sha256()
    one(renderer, *loras(files, "motion"))
    with pytest.raises(LoraError, match=message):
        one(renderer, lora)
    assert one(renderer).frames_sha256() == plain


def test_quantised_layers_get_branches(tiny: Path, files: Path) -> None:
    renderer = load_renderer(str(tiny), device="cpu", precision="bnb-int8")
    plain, styled, again = one(renderer), one(renderer, *loras(files, "style")), one(renderer)
    renderer.close()
    assert (styled.ran["loras"]["fused_layers"], styled.ran["loras"]["applied_layers"]) == (1, 3)
    assert (plain.frames != styled.frames).mean() > 0.05
    assert plain.frames_sha256() == again.frames_sha256()


# the command line


def test_render_takes_loras(tiny: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["render", "a red circle", "--height", "64", "--width", "64", "--checkpoint", str(tiny), "--device", "cpu"]

    def facts(*more: str) -> dict[str, Any]:
        assert main([*words, "-o", str(tmp_path / "frame.png"), "--json", *more]) == 0
        return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))

    style, motion = (str(files / f"{name}.safetensors") for name in ("style", "motion"))
    plain, both = facts(), facts("--lora", f"{style}:0.5", "--lora", motion)
    assert sorted(file["weight"] for file in both["ran"]["loras"]["files"]) == [0.5, 1.0]
    assert plain["frames_sha256"] != both["frames_sha256"]
    assert facts("--lora", f"{style}:0")["frames_sha256"] == plain["frames_sha256"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.safetensors", "foreign.safetensors"], "--lora gone.safetensors foreign.safetensors: there is no file"),
        (["foreign.safetensors"], "no linear layers of this transformer"),
        (["style.safetensors:loud"], "--lora style.safetensors:loud: 'loud' is no weight"),
        (["style.safetensors", "style.safetensors:2"], "names a file twice"),
    ],
)
def test_render_refuses_files_before_it_loads_the_model(
    tiny: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    words: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(files)
    (weights := tmp_path / "model").symlink_to(tiny)
    options = [word for each in words for word in ("--lora", each)]
    assert main(["render", "x", "-o", str(tmp_path / "x.png"), "--checkpoint", str(weights), *options]) == 2
    told = capsys.readouterr().err
    assert message in told and ("foreign" in told or "foreign.safetensors" not in words)
    assert not (tmp_path / "x.png").exists()


# whole runs


def job_of(tiny: Path, manifest: str, output: Path, *default: str, **changes: Any) -> Any:
    model = {"renderer": "ltx", "checkpoint": str(tiny), "loras": list(default)}
    changes.setdefault("shard_rows", 8)
    return make_job(manifest, output, model=model, defaults=SMALL, video={"crf": 0}, **changes)


def test_a_run_with_a_loras_column(renderer: LtxRenderer, tiny: Path, files: Path, tmp_path: Path) -> None:
    """Rows of four sets, in an order that would switch at every row."""
    style, motion = f"{files}/style.safetensors:0.8", f"{files}/motion.safetensors"
    lists = [[style], [], None, [motion, style], [style], [], [style, motion], None]
    seeds = [1, 1, 1, 1, 2, 2, 1, 2]
    manifest = write_manifest(tmp_path, ["p"] * 8, loras=lists, seed=seeds)
    job = job_of(tiny, manifest, tmp_path / "out", motion)
    summary = run(job)
    assert (summary.exit_code, summary.ok, summary.rendered) == (0, 8, 7), "rows 3 and 6 are one clip"
    output = check_output(job, summary.run)
    keys = [line["ltx_key"] for line in output.lines]
    assert keys[3] == keys[6] and len(set(keys)) == 7
    assert sum("lora" in record.timings for record in output.records.values()) <= 4, "a switch a set"
    for key, texts, seed in zip(keys, lists, seeds, strict=True):
        named = tuple(map(parse_lora, [motion] if texts is None else texts))
        (alone,) = renderer.render([replace(ROW, seed=seed, loras=named)])
        assert output.records[key].frames_sha256 == alone.frames_sha256()
        assert len(output.records[key].ran.get("loras", {}).get("files", [])) == len(named)
    assert run(job).rendered == 0


def test_a_run_in_batches_of_equal_sets(tiny: Path, files: Path, tmp_path: Path) -> None:
    style, motion = f"{files}/style.safetensors:0.8", f"{files}/motion.safetensors"
    lists = [[style], [], None, [motion, style], [style], [], [style, motion], None]
    manifest = write_manifest(tmp_path, ["p"] * 8, loras=lists)
    alone, batched = (job_of(tiny, manifest, tmp_path / f"{size}", motion, batch_size=size) for size in (1, 2))
    videos = []
    for job in (alone, batched):
        output = check_output(job, run(job).run)
        videos.append([read_media(Path(job.output, line["ltx_video"])).astype(int) for line in output.lines])
    assert {record.ran["batch_size"] for record in output.records.values()} == {2}
    assert all(np.abs(one - two).max() <= 2 for one, two in zip(*videos, strict=True))


def test_the_jobs_set_and_the_rows_own_are_one_key(tiny: Path, files: Path, tmp_path: Path) -> None:
    style = f"{files}/style.safetensors:0.8"
    by_job = job_of(tiny, write_manifest(tmp_path / "1", ["p", "q"]), tmp_path / "out", style)
    by_row = job_of(tiny, write_manifest(tmp_path / "2", ["p", "q"], loras=[[style], [style]]), tmp_path / "out")
    first, second = run(by_job), run(by_row)
    assert (first.rendered, second.rendered, second.reused) == (2, 0, 2)
    other = job_of(tiny, by_job.manifest, tmp_path / "out", f"{files}/style.safetensors:0.7")
    third = run(other)
    assert third.run != first.run and third.rendered == 2


def test_a_file_that_changed_is_seen(tiny: Path, files: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "a.safetensors", random_pairs(SHAPES))
    job = job_of(tiny, write_manifest(tmp_path, ["p"], loras=[["a.safetensors"]]), tmp_path / "out")
    assert run(job).rendered == 1
    write_lora(path, random_pairs(SHAPES, seed=5))
    assert run(job).rendered == 0
    assert run(job, RunOptions(check_media=True)).rendered == 1


def test_files_that_cannot_be_used_stop_the_run_before_anything_starts(tiny: Path, files: Path, tmp_path: Path) -> None:
    lists = [[f"{files}/style.safetensors"], ["gone.safetensors"], [f"{files}/foreign.safetensors:0.5"]]
    manifest = write_manifest(tmp_path, ["a", "b", "c"], loras=lists)
    with pytest.raises(ManifestError) as caught:
        run(job_of(tiny, manifest, tmp_path / "out"))
    assert [(issue.row, issue.column) for issue in caught.value.issues] == [(1, "loras"), (2, "loras")]
    assert "no linear layers of this transformer" in caught.value.issues[1].rule
    with pytest.raises(CheckpointError, match=r"model\.loras: .*foreign"):
        run(job_of(tiny, write_manifest(tmp_path / "2", ["a"]), tmp_path / "out", lists[2][0]))
    assert not (tmp_path / "out").exists()
    skipped = run(job_of(tiny, manifest, tmp_path / "out"), RunOptions(skip_invalid=True))
    assert (skipped.ok, skipped.failed) == (1, 2)


def test_files_in_an_object_store(s3_server: S3Server, tiny: Path, files: Path, tmp_path: Path) -> None:
    store = Storage(s3_server.uri("loras"))
    for name in ("style", "foreign"):
        store.upload(files / f"{name}.safetensors", f"{name}.safetensors")
    local, there = (f"{folder}/style.safetensors:0.8" for folder in (files, store.uri))
    first = run(job_of(tiny, write_manifest(tmp_path / "1", ["p"], loras=[[local]]), tmp_path / "out"))
    second = run(job_of(tiny, write_manifest(tmp_path / "2", ["p", "q"], loras=[[there]] * 2), tmp_path / "out"))
    assert (first.rendered, second.rendered, second.reused) == (1, 1, 1), "a file is its bytes, wherever it lies"
    lists = [[f"{store.uri}/gone.safetensors"], [f"{store.uri}/foreign.safetensors"]]
    with pytest.raises(ManifestError, match=r"there is no file s3://.*(\n.*)+no linear layers of this transformer"):
        run(job_of(tiny, write_manifest(tmp_path / "3", ["p", "q"], loras=lists), tmp_path / "out"))


def test_relative_files_of_a_job_are_refused_inside_a_ray_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    job = make_job("/abs/m.csv", "/abs/out", model={"loras": ["style.safetensors", "/abs/x.safetensors"]})
    with pytest.raises(JobError, match=r"^model\.loras: style\.safetensors is relative.*an absolute path or a URI$"):
        run(job)
