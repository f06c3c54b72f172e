"""Placement on a CUDA device, on the tiny checkpoint: page-locked memory, copies on a stream of their own, real limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_files import random_pairs, write_lora

from ltx_batch import Condition, LoraRef, RenderRequest, load_renderer
from ltx_batch.clip import Clip
from ltx_batch.model.attention import Kernel, attend
from ltx_batch.model.block_stream import BlockStream
from ltx_batch.model.decode import decode_row
from ltx_batch.model.device import free_bytes
from ltx_batch.model.noise import row_noise
from ltx_batch.model.placement import PassPlacement, Strain
from ltx_batch.model.slicing import Slices
from ltx_batch.renderer import LtxRenderer
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
BLOCKS = 6
CONFIG = """
pipeline_type: multi-scale
downscale_factor: 0.6666666
stg_mode: attention_values
first_pass: {timesteps: [1.0, 0.975, 0.725], guidance_scale: 3, stg_scale: 1, skip_block_list: [1, 4]}
second_pass: {timesteps: [0.9094, 0.4219], guidance_scale: 1, stg_scale: 0}
"""
PICTURE = np.random.default_rng(0).integers(0, 256, (1, 96, 160, 3), dtype=np.uint8)
REQUEST = RenderRequest(
    prompt="a red circle", height=96, width=160, num_frames=17, seed=7, conditions=(Condition(PICTURE, 9, 0.5),)
)
WIDE = RenderRequest(prompt="a red circle", height=384, width=512, num_frames=17, seed=7)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return write_tiny_checkpoint(folder, pipeline_config=CONFIG, transformer={"num_layers": BLOCKS})


def loaded(tiny: Path, **options: Any) -> LtxRenderer:
    """With precision and attention by name: what a stopwatch chooses may differ from one renderer to the next."""
    return load_renderer(str(tiny), **{"device": "cuda", "precision": "bf16", "attention": "native", **options})


def one(renderer: LtxRenderer, request: RenderRequest = REQUEST) -> Clip:
    return renderer.render([request])[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int8-weight", "bnb-int8"])
def test_offload_renders_the_same_bits(tiny: Path, precision: str) -> None:
    resident, offload = (loaded(tiny, precision=precision, placement=how) for how in ("resident", "offload"))
    expected = one(resident)
    for _ in range(3):
        clip = one(offload)
        assert clip.frames_sha256() == expected.frames_sha256()
    assert clip.ran["placement"]["mode"] == "offload"


@pytest.mark.parametrize("precision", ["bf16", "int8", "int8-weight", "bnb-int8"])
def test_a_model_that_leaves_the_device_renders_the_same_bits(tiny: Path, precision: str) -> None:
    renderer = loaded(tiny, precision=precision)
    expected = one(renderer)
    assert expected.ran["placement"]["mode"] == "resident"
    renderer._pipeline.lodging.leave()
    for _ in range(3):
        clip = one(renderer)
        assert clip.ran["placement"]["mode"] == "offload"
        assert clip.frames_sha256() == expected.frames_sha256()


@pytest.mark.parametrize("kept", range(BLOCKS + 1))
def test_any_number_of_blocks_may_stay(tiny: Path, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = one(loaded(tiny))
    offload = loaded(tiny, placement="offload")
    placing = offload._pipeline.placing
    decided = placing.placement

    def with_kept(work: Any) -> Any:
        found = decided(work)
        return replace(
            found, passes=tuple(PassPlacement(kept) for _ in found.passes), beside=dict.fromkeys(found.beside)
        )

    monkeypatch.setattr(placing, "placement", with_kept)
    for _ in range(3):
        assert one(offload).frames_sha256() == expected.frames_sha256()


def test_host_memory_is_page_locked(tiny: Path) -> None:
    offload = loaded(tiny, placement="offload")
    one(offload)
    stream = offload._pipeline.lodging._streamed
    assert stream is not None
    assert all(pack.host.is_pinned() for pack in stream._blocks._packs)


def test_a_stream_of_large_blocks_waits_for_its_copies() -> None:
    """Blocks of 64 MiB: a forward that did not wait would work with the block before."""
    torch.manual_seed(0)
    blocks = [torch.nn.Linear(4096, 4096, bias=False, device=CUDA) for _ in range(7)]
    values = torch.randn(64, 4096, device=CUDA)

    @torch.inference_mode()
    def forward() -> torch.Tensor:
        out = values
        for block in blocks:
            out = block(out)
        return out

    expected = forward()
    stream = BlockStream(blocks, CUDA)
    before = torch.cuda.memory_allocated()
    for kept in (0, 2, 5, 7, 0):
        stream.keep(kept)
        for _ in range(5):
            assert torch.equal(forward(), expected)
    assert torch.cuda.memory_allocated() - before <= 3 * 2**26
    stream.leave()
    assert torch.cuda.memory_allocated() - before < 2**25


def test_a_lora_is_put_on_streamed_blocks(tiny: Path, tmp_path: Path) -> None:
    shapes = {f"transformer_blocks.{block}.attn1.to_q": (32, 32) for block in range(BLOCKS)}
    lora = LoraRef(write_lora(tmp_path / "lora.safetensors", random_pairs(shapes, size=0.5)), 0.8)
    resident, offload = (loaded(tiny, placement=how) for how in ("resident", "offload"))
    for request in (REQUEST, replace(REQUEST, loras=(lora,)), REQUEST):
        assert one(offload, request).frames_sha256() == one(resident, request).frames_sha256()


def test_a_limit_is_what_is_free(tiny: Path) -> None:
    total = torch.cuda.get_device_properties(CUDA).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(0.05, CUDA)
        free = free_bytes(CUDA)
        assert free is not None and free <= 0.05 * total
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)


def test_a_decode_that_really_runs_out_of_memory_is_done_again_in_slices(tiny: Path) -> None:
    """The prediction is put out of action, and the device limited to what the decode takes, less a fifth."""
    renderer = loaded(tiny, precision="fp32")
    whole = one(renderer, WIDE)
    assert whole.peak_bytes is not None and whole.ran["tiling"] is False
    torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((held + (whole.peak_bytes - held) * 0.8) / total, CUDA)
        clip = one(renderer, WIDE)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    assert clip.ran["degraded"] is False and clip.ran["tiling"].startswith("slices of ")
    assert np.abs(clip.frames.astype(int) - whole.frames).max() <= 1
    assert clip.ran["out_of_memory"][0].startswith("decode ran out of memory")
    assert renderer._pipeline.placing._strain != Strain()
    assert clip.frames.shape == whole.frames.shape


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@torch.inference_mode()
def test_a_sliced_decode_is_the_whole_one(tiny: Path, dtype: torch.dtype, tolerance: float) -> None:
    renderer = loaded(tiny, precision="fp32")
    vae, plan = renderer._pipeline.vae.to(dtype), renderer.plan(WIDE)
    latents = torch.randn(1, 8, 3, 12, 16, generator=torch.Generator().manual_seed(0)).to(CUDA)
    whole, on_device, to_host = (
        torch.cat(list(decode_row(vae, latents, plan, row_noise(7), slices)), dim=2)
        for slices in (None, Slices(2**22), Slices(2**22, to_host=True))
    )
    assert torch.equal(on_device, to_host)
    assert (whole - on_device).abs().max() < tolerance


@pytest.mark.parametrize("name", ["native", "cudnn", "flash", "efficient"])
@pytest.mark.parametrize("channels", [64, 128])
def test_kernels_agree(name: str, channels: int) -> None:
    query, key, value = (torch.randn(1, 4, 300, channels, device=CUDA, dtype=torch.bfloat16) for _ in range(3))
    expected = (query.float() @ key.float().mT / channels**0.5).softmax(-1) @ value.float()
    found = attend(name, query, key, value).float()
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_kernels_are_timed_once_a_shape() -> None:
    kernel = Kernel()
    kernel.choose((1, 32, 2688, 64), torch.bfloat16, CUDA)
    timed = dict(kernel.timed_ms[1, 32, 2688, 64])
    assert {"native", "cudnn", "flash", "efficient"} == timed.keys() and all(ms > 0 for ms in timed.values())
    kernel.choose((1, 32, 2688, 64), torch.bfloat16, CUDA)
    assert kernel.timed_ms[1, 32, 2688, 64] == timed
