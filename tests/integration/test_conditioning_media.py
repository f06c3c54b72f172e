"""Conditioning and input media through the renderer and through a job: pre-processing, video to video, and their faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from ltx_batch import Condition, RenderRequest, load_renderer
from ltx_batch.clip import Clip
from ltx_batch.driver import RunOptions, run
from ltx_batch.errors import InvalidRow, ManifestError, MediaError
from ltx_batch.job import VideoSpec
from ltx_batch.media import write_video
from ltx_batch.model.pipeline_config import PipelineConfig, load_pipeline_config
from ltx_batch.model.plan import Target
from ltx_batch.model.preprocess import prepare_input_media, prepare_media
from ltx_batch.recipe import make_recipe
from ltx_batch.renderer import LtxRenderer, resolve_preprocess
from tests.integration.job_runs import check_output, make_job, write_manifest
from tests.tiny_checkpoint import write_tiny_checkpoint

CONFIG = "timesteps: [0.9, 0.5]\nguidance_scale: 1\n"
REQUEST = RenderRequest(prompt="a red circle", height=64, width=96, num_frames=9, seed=7)
SIZE = {"height": 64, "width": 96, "num_frames": 9}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), pipeline_config=CONFIG)


@pytest.fixture(scope="module")
def official(tiny: Path) -> Iterator[LtxRenderer]:
    loaded = load_renderer(str(tiny), device="cpu", condition_preprocess="official")
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def plain(tiny: Path) -> Iterator[LtxRenderer]:
    loaded = load_renderer(str(tiny), device="cpu")
    yield loaded
    loaded.close()


def pictures(count: int = 1, *, seed: int = 0, height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def video(path: Path, frames: np.ndarray) -> str:
    write_video(Clip(frames, 8.0), path, VideoSpec(crf=0), metadata={})
    return str(path)


def hashed(renderer: LtxRenderer, **changes: Any) -> str:
    return renderer.render([replace(REQUEST, **changes)])[0].frames_sha256()


# pre-processing


def test_official_renders_from_what_it_prepared(official: LtxRenderer, plain: LtxRenderer) -> None:
    """A picture of another shape and size, at the first frame and at a later one."""
    media = pictures(height=100, width=131)
    request = replace(REQUEST, conditions=(Condition(media), Condition(media, 5, 0.5)))
    target = Target(64, 96, 9)
    given = [
        (prepare_media(media, start, strength, target, "official").pixels, start, strength)
        for start, strength in ((0, 1.0), (5, 0.5))
    ]
    assert given[0][0].shape[-2:] == (86, 130), "the size of the cropped file, without its odd lines"
    assert torch.equal(official.trace(request).first_pass, plain.trace(request, conditions=given).first_pass)
    assert not torch.equal(official.trace(request).first_pass, plain.trace(request).first_pass)


def test_rows_with_media_of_different_sizes_share_a_batch(official: LtxRenderer) -> None:
    sizes = [(64, 96), (100, 131), (50, 60)]
    requests = [
        replace(REQUEST, seed=seed, conditions=(Condition(pictures(height=height, width=width)),))
        for seed, (height, width) in enumerate(sizes)
    ]
    together = official.render(requests)
    for clip, request in zip(together, requests, strict=True):
        alone = official.render([request])[0]
        assert np.abs(clip.frames.astype(int) - alone.frames).max() <= 1


def test_an_official_config_asks_for_official_and_a_job_may_say_otherwise() -> None:
    official, own = load_pipeline_config("ltxv-13b-0.9.8-distilled"), PipelineConfig(timesteps=(1.0, 0.5))
    assert [resolve_preprocess(None, named) for named in (None, own, official)] == ["none", "none", "official"]
    for asked in ("none", "official"):
        assert {resolve_preprocess(asked, named) for named in (None, own, official)} == {asked}


def test_it_is_part_of_the_recipe_by_the_name_that_holds(tiny: Path, tmp_path: Path) -> None:
    model = {"renderer": "ltx", "checkpoint": str(tiny), "precision": "fp32"}
    manifest = write_manifest(tmp_path, ["a"])
    unsaid, none, official = (
        make_recipe(make_job(manifest, tmp_path / "out", model=model, **said))
        for said in ({}, {"condition_preprocess": "none"}, {"condition_preprocess": "official"})
    )
    assert unsaid == none != official
    assert REQUEST.key(none) != REQUEST.key(official)


# video to video


def test_a_clip_begins_from_its_input_media(plain: LtxRenderer, tmp_path: Path) -> None:
    media = pictures(9)
    path = video(tmp_path / "in.mp4", media)
    fsspec.filesystem("memory").pipe_file("/media/in.mp4", Path(path).read_bytes())
    stored, remote = (hashed(plain, input_media=Condition(source)) for source in (path, "memory://media/in.mp4"))
    assert stored == remote
    other = hashed(plain, input_media=Condition(pictures(9, seed=1)))
    assert len({stored, other, hashed(plain)}) == 3


def test_less_noise_keeps_more_of_it(plain: LtxRenderer) -> None:
    """At the lowest level the latents are those of the media, almost."""
    media = pictures(9, height=80, width=120)
    pixels = prepare_input_media(media, Target(64, 96, 9), "none")
    encoded = plain._pipeline.vae.encode(pixels).latent_dist.mean
    distances = []
    for level in (0.9, 0.01):
        request = replace(REQUEST, input_media=Condition(media), timesteps=(level,))
        found = plain.trace(request, noise=lambda name, shape: torch.zeros(shape)).first_pass
        vae = plain._pipeline.vae
        raw = found * vae.latents_std.view(1, -1, 1, 1, 1) + vae.latents_mean.view(1, -1, 1, 1, 1)
        distances.append(float((raw - encoded).abs().max()))
    assert distances[1] < 0.1 < distances[0]


def test_input_media_are_preprocessed_too(official: LtxRenderer, plain: LtxRenderer) -> None:
    media = Condition(pictures(9))
    assert hashed(official, input_media=media) != hashed(plain, input_media=media)


def test_more_frames_than_needed_are_left(plain: LtxRenderer) -> None:
    media = pictures(25)
    assert hashed(plain, num_frames=8, input_media=Condition(media)) == hashed(
        plain, num_frames=8, input_media=Condition(media[:9])
    )


def test_a_picture_begins_a_picture(plain: LtxRenderer) -> None:
    assert plain.render([replace(REQUEST, num_frames=1, input_media=Condition(pictures()))])[0].frames.shape[0] == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_media": Condition(pictures(8))}, MediaError, "has 8 frames, and the clip has 9 frames, which take 9"),
        ({"input_media": Condition(pictures())}, MediaError, "is a picture, and the clip has 9 frames, which take 9"),
        ({"input_media": Condition("nowhere.mp4")}, MediaError, "nowhere.mp4 does not exist"),
        ({"input_media": Condition(pictures(9)), "timesteps": (1.0, 0.5)}, InvalidRow, "drowned in noise"),
        ({"input_media": Condition(pictures(9).astype(np.float32))}, MediaError, "found float32"),
    ],
)
def test_what_cannot_begin_a_clip_is_told(
    plain: LtxRenderer, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        hashed(plain, **changes)


def test_a_broken_file_is_named_as_the_request_names_it(plain: LtxRenderer, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n rest")
    with pytest.raises(MediaError) as raised:
        hashed(plain, conditions=(Condition(tmp_path / "cut.png"),))
    assert str(raised.value).startswith(f"{tmp_path}/cut.png: ")


# jobs


def test_a_job_renders_from_input_media_and_refuses_rows_whose_media_are_short(tmp_path: Path, tiny: Path) -> None:
    video(tmp_path / "long.mp4", pictures(12))
    video(tmp_path / "short.mp4", pictures(5))
    paths = ["long.mp4", "short.mp4", None]
    manifest = write_manifest(tmp_path, ["from", "short", "plain"], input_media_path=paths, seed=[1, 1, 1])
    model = {"renderer": "ltx", "checkpoint": str(tiny), "precision": "fp32"}
    job = make_job(manifest, tmp_path / "out", model=model, defaults=SIZE, condition_preprocess="official")
    with pytest.raises(ManifestError, match=r"row 1, input_media_path = 'short.mp4': .* has 5 frames"):
        run(job)
    summary = run(job, RunOptions(skip_invalid=True))
    assert (summary.ok, summary.failed) == (2, 1)
    output = check_output(job, summary.run)
    failed = output.line("short")
    assert (failed["ltx_error_class"], failed["ltx_attempts"]) == ("InvalidRow", 0)
    assert "has 5 frames, and the clip has 9 frames, which take 9" in failed["ltx_error"]
    assert output.line("from")["ltx_frames_sha256"] != output.line("plain")["ltx_frames_sha256"]


def test_media_that_changed_after_they_were_hashed_fail_their_row(tmp_path: Path, tiny: Path) -> None:
    from ltx_batch.model.frames import load_media

    path = video(tmp_path / "in.mp4", pictures(9))
    request = replace(REQUEST, input_media=Condition(path, media_sha256="0" * 64))
    with pytest.raises(MediaError, match="it changed after it was hashed"):
        load_media(request)
    loaded = load_media(replace(REQUEST, input_media=Condition(path))).input_media
    assert loaded is not None and np.asarray(loaded.media).shape == (9, 64, 96, 3)


def test_a_later_video_must_start_where_a_latent_frame_does(plain: LtxRenderer) -> None:
    with pytest.raises(InvalidRow, match="must start at a multiple of 8, found frame 4"):
        hashed(plain, num_frames=25, conditions=(Condition(pictures(9), 4),))
    still = hashed(plain, num_frames=25, conditions=(Condition(pictures(8), 4),))
    assert still == hashed(plain, num_frames=25, conditions=(Condition(pictures(8)[:1], 4),)), "below 9 frames: a still"


# before its turn


def test_what_is_prepared_ahead_renders_alike_and_is_not_prepared_again(official: LtxRenderer, tmp_path: Path) -> None:
    still, moving = pictures(height=100, width=131), video(tmp_path / "in.mp4", pictures(9))
    request = replace(REQUEST, conditions=(Condition(still, 5),), input_media=Condition(moving))
    prepared = official.prepare(request)
    Path(moving).unlink()
    assert official.prepare(prepared) == prepared, "their media are the same objects"
    first, again = official.render([prepared, prepared])
    assert first.frames_sha256() == again.frames_sha256()
    video(tmp_path / "in.mp4", pictures(9))
    assert official.render([prepared])[0].frames_sha256() == official.render([request])[0].frames_sha256()


# multi-scale


def test_both_passes_of_a_multi_scale_render_take_the_media(tiny: Path, tmp_path: Path) -> None:
    """Conditions trimmed to 8k + 1, at three placements, from files of another size, and input media beside them."""
    passes = (
        "first_pass: {timesteps: [0.9, 0.5], guidance_scale: 1}\nsecond_pass: {timesteps: [0.6], guidance_scale: 1}\n"
    )
    (tmp_path / "pipeline.yaml").write_text(f"pipeline_type: multi-scale\n{passes}")
    config = str(tmp_path / "pipeline.yaml")
    renderer = load_renderer(str(tiny), device="cpu", pipeline_config=config, condition_preprocess="official")
    request = replace(REQUEST, height=120, width=190, num_frames=33)
    media = pictures(40, height=100, width=131)
    conditions = (Condition(media[:12]), Condition(media[:1], 5), Condition(media, 16))  # 9, 1 and 17 frames
    wanted: list[str] = []

    def noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if "vae_sample" in name:
            wanted.append(f"{name} {shape[2]}")
        return torch.zeros(shape)

    trace = renderer.trace(replace(request, conditions=conditions, input_media=Condition(media)), noise=noise)
    sampled = [f"vae_sample.{index} {latent_frames}" for index, latent_frames in enumerate((2, 1, 3))]
    assert wanted == [
        "pass1.vae_sample.input_media 5",
        *(f"pass1.{one}" for one in sampled),
        *(f"pass2.{one}" for one in sampled),
    ]
    assert trace.frames.shape == (1, 3, 33, 120, 190)
    without = renderer.trace(replace(request, input_media=Condition(media)), noise=noise)
    assert trace.second_pass is not None and without.second_pass is not None
    assert not torch.equal(trace.second_pass, without.second_pass)
