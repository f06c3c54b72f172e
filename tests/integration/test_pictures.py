"""Clips of one frame are PNG files: in a job's output, and from `render`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from servers import S3Server

from ltx_batch.cli import main
from ltx_batch.clip import Clip
from ltx_batch.driver import run
from ltx_batch.job import JobSpec
from ltx_batch.media import read_media
from ltx_batch.media.read import read_metadata
from ltx_batch.recipe import make_recipe
from ltx_batch.report.contact_sheet import write_contact_sheet
from tests.integration.job_runs import check_output, make_job, open_output, read_records, write_manifest
from tests.tiny_checkpoint import write_tiny_checkpoint

CONFIG = "timesteps: [1.0, 0.5]\nguidance_scale: 1\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), pipeline_config=CONFIG)


def real_job(folder: Path, tiny: Path, output: str = "out", **changes: Any) -> JobSpec:
    manifest = write_manifest(folder, ["a circle", "a square"], num_frames=[1, 9], height=[64, 64], width=[96, 96])
    model = {"renderer": "ltx", "checkpoint": str(tiny), "precision": "fp32"}
    return make_job(manifest, folder / output, model=model, **changes)


def test_a_job_writes_one_frame_as_a_picture_and_more_as_a_video(tmp_path: Path, tiny: Path) -> None:
    job = real_job(tmp_path, tiny)
    summary = run(job)
    assert (summary.ok, summary.failed) == (2, 0)
    output = check_output(job, summary.run)
    picture, video = output.lines
    assert [Path(line["ltx_video"]).suffix for line in (picture, video)] == [".png", ".mp4"]
    assert (
        picture["ltx_video"] == f"videos/{picture['ltx_key'][:2]}/{picture['ltx_key']}.{picture['ltx_sha256'][:12]}.png"
    )
    path = tmp_path / "out" / picture["ltx_video"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == picture["ltx_sha256"]
    frames = read_media(path)
    assert Clip(frames, 8.0).frames_sha256() == picture["ltx_frames_sha256"], "no pixel is lost"
    assert output.records[picture["ltx_key"]].num_frames == 1
    for line in output.lines:
        texts = read_metadata(tmp_path / "out" / line["ltx_video"])
        assert texts.keys() == {"ltx_batch_key", "ltx_batch_recipe"} and texts["ltx_batch_key"] == line["ltx_key"]
        assert json.loads(texts["ltx_batch_recipe"]) == make_recipe(job)


def test_the_same_job_elsewhere_writes_the_same_bytes(tmp_path: Path, tiny: Path) -> None:
    jobs = [real_job(tmp_path, tiny, output) for output in ("one", "two")]
    names = []
    for job in jobs:
        run(job)
        names.append(sorted(record.video or "" for record in read_records(job).values()))
    assert names[0] == names[1]
    again = run(jobs[0])
    assert (again.ok, again.rendered) == (2, 0)


@pytest.mark.parametrize("where", ["local", "s3"])
def test_the_contact_sheet_shows_pictures(tmp_path: Path, s3_server: S3Server, where: str) -> None:
    output = str(tmp_path / "out") if where == "local" else s3_server.uri("pictures")
    size = {"height": 64, "width": 128, "num_frames": 1}
    job = make_job(write_manifest(tmp_path, ["colour bars"]), output, defaults=size)
    run(job)
    (record,) = read_records(job).values()
    assert record.video is not None and record.video.endswith(".png")
    assert write_contact_sheet(job).clips == 1
    storage = open_output(job)
    storage.download("report/contact_sheet.png", tmp_path / "sheet.png")
    cells = np.asarray(Image.open(tmp_path / "sheet.png"))[16 + 32 : 16 + 96, 16 : 16 + 128]
    storage.download(record.video, tmp_path / "picture.png")
    assert np.array_equal(cells, read_media(tmp_path / "picture.png")[0]), "a frame as wide as its cell, as it is"


# render


def render(tiny: Path, output: Path, *words: str) -> int:
    named = ["--checkpoint", str(tiny), "--device", "cpu", "--height", "64", "--width", "96", "--seed", "3"]
    return main(["render", "a red circle", "-o", str(output), *named, *words])


def test_render_writes_what_the_name_says(tiny: Path, tmp_path: Path) -> None:
    for name, words in (("a.png", []), ("b.png", ["--num-frames", "1"]), ("c.mp4", ["--num-frames", "1"])):
        assert render(tiny, tmp_path / name, *words) == 0
        assert read_media(tmp_path / name).shape == (1, 64, 96, 3)
        assert read_metadata(tmp_path / name) == {"prompt": "a red circle", "seed": "3"}
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"


def test_a_picture_of_many_frames_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert render(Path("/absent"), tmp_path / "x.png", "--num-frames", "17") == 2
    told = capsys.readouterr().err
    assert "x.png holds one frame, not 17: leave --num-frames out, or give -o x.mp4" in " ".join(told.split())
    assert list(tmp_path.iterdir()) == []
