"""Rendering with parts that come and leave: the same bits as with all of them in place, and what memory's end does."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lora_files import random_pairs, write_lora

from ltx_batch import Condition, LoraRef, RenderRequest, load_renderer
from ltx_batch.clip import Clip
from ltx_batch.model import memory, render
from ltx_batch.model.lodging import Lodging
from ltx_batch.model.pipeline import Stopwatch
from ltx_batch.renderer import LtxRenderer
from tests.tiny_checkpoint import write_tiny_checkpoint

BLOCKS = 6
CONFIG = """
pipeline_type: multi-scale
downscale_factor: 0.6666666
stg_mode: attention_values
first_pass: {timesteps: [1.0, 0.975, 0.725], guidance_scale: 3, stg_scale: 1, skip_block_list: [1, 4]}
second_pass: {timesteps: [0.9094, 0.4219], guidance_scale: 1, stg_scale: 0}
"""
PICTURE = np.random.default_rng(0).integers(0, 256, (1, 96, 160, 3), dtype=np.uint8)
REQUEST = RenderRequest(prompt="a red circle", height=96, width=160, num_frames=17, seed=7)
GIVEN = replace(REQUEST, conditions=(Condition(PICTURE), Condition(PICTURE, 9, 0.5)))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_checkpoint(folder, pipeline_config=CONFIG, transformer={"num_layers": BLOCKS})


@pytest.fixture(scope="module")
def resident(tiny: Path) -> LtxRenderer:
    return load_renderer(str(tiny), device="cpu")


def loaded(tiny: Path, **options: Any) -> LtxRenderer:
    return load_renderer(str(tiny), **{"device": "cpu", "placement": "offload", **options})


def one(renderer: LtxRenderer, request: RenderRequest = REQUEST) -> Clip:
    return renderer.render([request])[0]


# parts that come and leave


@pytest.mark.parametrize("request_", [REQUEST, GIVEN], ids=["plain", "given"])
def test_offload_renders_the_same_bits(tiny: Path, resident: LtxRenderer, request_: RenderRequest) -> None:
    offload = loaded(tiny)
    expected = one(resident, request_)
    for _ in range(2):
        clip = one(offload, request_)
        assert clip.frames_sha256() == expected.frames_sha256()
    assert clip.ran["placement"]["mode"] == "offload" and clip.ran["placement"]["kept_blocks"] == [0, 0]
    assert expected.ran["placement"]["mode"] == "resident"
    assert not clip.ran["degraded"] and clip.ran["tiling"] is False
    trace = offload.trace(REQUEST)
    assert torch.equal(trace.first_pass, resident.trace(REQUEST).first_pass)


def test_a_batch_is_offloaded_too(tiny: Path, resident: LtxRenderer) -> None:
    requests = [replace(REQUEST, seed=seed) for seed in range(2)]
    pairs = zip(loaded(tiny).render(requests), resident.render(requests), strict=True)
    assert all(ours.frames_sha256() == theirs.frames_sha256() for ours, theirs in pairs)


def test_a_part_is_on_the_device_for_its_stage_alone(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    at = Lodging.at

    @contextmanager
    def spy(self: Lodging, stage: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with at(self, stage, *args, **kwargs):
            seen.append((stage, self.held_bytes))
            yield

    monkeypatch.setattr(Lodging, "at", spy)
    renderer = loaded(tiny)
    one(renderer, GIVEN)
    sizes = renderer._pipeline.placing._sizes
    assert [stage for stage, _ in seen] == ["condition", "denoise", "upsample", "condition", "denoise", "decode"]
    found = dict(seen)
    padding = 1.3  # tiny tensors, each at an address of 256 bytes
    assert sizes.encoder_bytes <= found["condition"] <= padding * sizes.encoder_bytes + 10_000
    assert sizes.decoder_bytes <= found["decode"] <= padding * sizes.decoder_bytes + 10_000
    streamed = sizes.rest_bytes + 2 * max(sizes.blocks)
    assert streamed <= found["denoise"] <= padding * streamed + 20_000
    renderer._pipeline.lodging.leave()
    assert renderer._pipeline.lodging.held_bytes == 0


@pytest.mark.parametrize("precision", ["fp32", "bnb-int8"])
def test_a_lora_is_put_on_streamed_blocks_and_taken_off_again(tiny: Path, tmp_path: Path, precision: str) -> None:
    shapes = {
        f"transformer_blocks.{block}.{layer}": (32, 32) for block in (0, 3) for layer in ("attn1.to_q", "attn2.to_v")
    }
    lora = LoraRef(
        write_lora(tmp_path / "lora.safetensors", random_pairs({**shapes, "proj_out": (8, 32)}, size=0.5)), 0.8
    )
    plain, offload = (loaded(tiny, precision=precision, placement=how) for how in ("resident", "offload"))
    hashes = []
    for request in (REQUEST, replace(REQUEST, loras=(lora,)), REQUEST):
        hashes.append(one(offload, request).frames_sha256())
        assert hashes[-1] == one(plain, request).frames_sha256()
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize("precision", ["bnb-int8", "int8", "int8-weight"])
def test_quantised_layers_are_moved(tiny: Path, precision: str) -> None:
    plain, offload = (loaded(tiny, precision=precision, placement=how) for how in ("resident", "offload"))
    assert one(offload).frames_sha256() == one(plain).frames_sha256()
    assert one(offload).frames_sha256() == one(plain).frames_sha256(), "and once more"


def test_the_text_encoder_and_offloaded_parts_share_a_device(tiny: Path, resident: LtxRenderer) -> None:
    clip = one(loaded(tiny))
    assert clip.ran["text"]["encoder"] == 2
    assert clip.frames_sha256() == one(resident).frames_sha256()


# what is decided is what is done


def memory_gib(renderer: LtxRenderer, *, blocks: float, request: RenderRequest = REQUEST) -> float:
    """Of a device with room for so many blocks beside the last pass."""
    sizes = renderer._pipeline.placing._sizes
    plan = renderer.plan(request)
    taken = memory.denoise_bytes(sizes, plan.passes[-1], memory.Work(plan))
    return (sizes.rest_bytes + blocks * max(sizes.blocks) + taken) / memory.USABLE / memory.GIB


def test_as_many_blocks_stay_as_fit(tiny: Path, resident: LtxRenderer) -> None:
    limited = loaded(tiny, placement="auto", device_memory_gib=memory_gib(resident, blocks=4.5))
    clip = one(limited)
    assert clip.ran["placement"]["mode"] == "offload" and clip.ran["placement"]["kept_blocks"][1] == 2
    assert "resident wants" in clip.ran["placement"]["reason"]
    assert clip.frames_sha256() == one(resident).frames_sha256() == one(limited).frames_sha256()


def test_what_is_decided_is_logged_once(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    renderer = loaded(tiny, device_memory_gib=1.0)
    with caplog.at_level(logging.INFO, logger="ltx_batch.model.placing"):
        one(renderer)
        one(renderer)
    told = [record.message for record in caplog.records]
    assert len(told) == 1 and told[0].startswith("placement offload: resident wants")


def test_rows_that_all_differ_are_not_all_remembered(tiny: Path) -> None:
    """A frame rate of its own makes a row's work one of its own."""
    renderer = loaded(tiny)
    placing = renderer._pipeline.placing
    works = [memory.Work(renderer.plan(replace(REQUEST, frame_rate=10 + index / 100))) for index in range(300)]
    placements = [placing.placement(work) for work in works]
    assert 1 < len(placing._placements) <= 64
    assert placing.placement(works[-1]) is placements[-1], "decided once"
    first = placing.placement(works[0])
    for work in works[:200]:
        placing.placement(works[0])
        placing.placement(work)
    assert placing.placement(works[0]) is first, "what goes on being asked for is not forgotten"


# cuts

WIDE = RenderRequest(prompt="a red circle", height=256, width=448, num_frames=9, seed=7)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = "timesteps: [1.0, 0.7]\nguidance_scale: 1\n"
    return write_tiny_checkpoint(tmp_path_factory.mktemp("base"), pipeline_config=config)


def test_a_decode_that_does_not_fit_is_sliced_and_the_same(base: Path) -> None:
    whole = one(loaded(base, placement="auto"), WIDE)
    limited = loaded(base, placement="auto", device_memory_gib=0.15)
    clip = one(limited, WIDE)
    assert clip.ran["tiling"].startswith("slices of 0.0") and clip.ran["degraded"] is False
    assert whole.ran["tiling"] is False and whole.ran["degraded"] is False
    assert clip.frames.shape == whole.frames.shape
    assert far_from(clip, whole) < 1e-4
    assert limited.trace(WIDE).first_pass.equal(loaded(base).trace(WIDE).first_pass), "latents are not touched"


def far_from(a: Clip, b: Clip) -> float:
    """Mean difference, as a share of the contrast."""
    return float(np.abs(a.frames.astype(float) - b.frames).mean() / b.frames.std())


def test_long_media_are_encoded_in_tiles(base: Path) -> None:
    media = np.random.default_rng(0).integers(0, 256, (9, 256, 448, 3), dtype=np.uint8)
    request = replace(WIDE, conditions=(Condition(media),))
    limited = loaded(base, placement="auto", device_memory_gib=0.15)
    clip = one(limited, request)
    assert clip.ran["degraded"] is True
    assert limited.trace(request).first_pass.shape == loaded(base).trace(request).first_pass.shape
    assert not limited.trace(request).first_pass.equal(loaded(base).trace(request).first_pass)
    assert limited._pipeline.vae.use_tiling is False


# memory that runs out


@dataclass(slots=True)
class Fault(Stopwatch):
    """Runs out of memory at the end of a stage, as often as `faults` says."""

    faults: ClassVar[Counter[str]] = Counter()
    stages: ClassVar[list[str]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        with Stopwatch.stage(self, name):
            yield
            self.stages.append(name)
            if self.faults[name] > 0:
                self.faults[name] -= 1
                raise torch.OutOfMemoryError(f"scripted: {name} is too large")


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Fault]]:
    monkeypatch.setattr(render, "Stopwatch", Fault)
    Fault.faults.clear()
    Fault.stages.clear()
    yield Fault


def test_a_decode_that_runs_out_of_memory_is_done_again_in_slices(base: Path, fault: type[Fault]) -> None:
    renderer = loaded(base, placement="auto")
    fault.faults["decode"] = 1
    clip = one(renderer, WIDE)
    assert fault.stages.count("denoise") == 1, "the denoising is not lost"
    assert clip.ran["degraded"] is False and clip.ran["tiling"] == "slices of 0.05 GiB, to the host"
    assert clip.ran["out_of_memory"][0].startswith("decode ran out of memory: ")
    assert clip.ran["placement"]["mode"] == "resident"
    again = one(renderer, WIDE)
    assert again.frames_sha256() == clip.frames_sha256(), "for the rest of the process"


def test_other_stages_step_down_and_keep_what_is_done(tiny: Path, resident: LtxRenderer, fault: type[Fault]) -> None:
    renderer = loaded(tiny, placement="auto")
    fault.faults.update({"upsample": 1})
    clip = one(renderer)
    assert fault.stages.count("denoise") == 2, "one a pass: the first pass is not done again"
    assert clip.ran["placement"]["mode"] == "offload" and clip.ran["degraded"] is False
    assert clip.ran["out_of_memory"] == [f"upsample ran out of memory: {clip.ran['placement']['reason']}"]
    assert clip.frames_sha256() == one(resident).frames_sha256()


def test_the_last_step_goes_in_chunks(tiny: Path, resident: LtxRenderer, fault: type[Fault]) -> None:
    renderer = loaded(tiny, placement="auto")
    fault.faults["denoise"] = 2
    clip = one(renderer)
    assert clip.ran["placement"]["chunk_tokens"] == memory.CHUNK_TOKENS
    assert len(clip.ran["out_of_memory"]) == 2
    assert clip.frames_sha256() == one(resident).frames_sha256(), "all tokens are one chunk"


def test_nothing_left_to_try_is_an_error_and_the_next_row_goes_on(tiny: Path, fault: type[Fault]) -> None:
    renderer = loaded(tiny)
    fault.faults["denoise"] = 9
    with pytest.raises(torch.OutOfMemoryError, match="scripted: denoise"):
        one(renderer)
    fault.faults.clear()
    assert one(renderer).ran["placement"]["mode"] == "offload"
