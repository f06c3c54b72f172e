"""A sliced decode is the whole one: every kind of decoder there is, and memory counted from live tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo

from ltx_batch.model import memory
from ltx_batch.model.decode import decode_latents, decode_row
from ltx_batch.model.memory import ModelSizes
from ltx_batch.model.noise import row_noise
from ltx_batch.model.plan import Guidance, PassPlan, Plan, Target
from ltx_batch.model.slices import decode_in_slices, decoder_steps, sliced_axis
from ltx_batch.model.slicing import Slices
from tests.live_bytes import Live
from tests.tiny_checkpoint import LATENT_CHANNELS, VAE

# Releases 0.9.5 to 0.9.8; 0.9.0, without timesteps and with layers that change the width; 0.9.1, with noise.
OLD: dict[str, Any] = {
    **VAE,
    "block_out_channels": (8, 16, 32, 32),
    "down_block_types": ("LTXVideoDownBlock3D",) * 4,
    "layers_per_block": (1,) * 5,
    "spatio_temporal_scaling": (True, True, True, False),
    "decoder_block_out_channels": (8, 16, 32, 32),
    "decoder_layers_per_block": (2, 1, 2, 1, 1),
    "decoder_spatio_temporal_scaling": (True, True, True, False),
    "decoder_inject_noise": (False,) * 5,
    "upsample_residual": (False,) * 4,
    "upsample_factor": (1,) * 4,
    "timestep_conditioning": False,
}
NOISY = {**OLD, "decoder_inject_noise": (True, True, False, True, False), "timestep_conditioning": True}
NOISY |= {"decoder_block_out_channels": (16, 16, 16, 16)}
KINDS = {"0.9.0": OLD, "0.9.8": VAE, "causal": {**VAE, "decoder_causal": True}}
SIZES = [(1, 6, 5), (3, 2, 9), (2, 3, 7), (2, 1, 1)]  # latents: frames, height, width


def built(config: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLLTXVideo(**config).eval()
        for name, parameter in vae.named_parameters():
            if "per_channel_scale" in name:
                torch.nn.init.normal_(parameter)
    vae.latents_std.copy_(torch.linspace(0.5, 2.0, LATENT_CHANNELS))
    return vae


def latents(size: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(1, LATENT_CHANNELS, *size, generator=torch.Generator().manual_seed(0))


def plan(size: tuple[int, int, int]) -> Plan:
    frames, height, width = (size[0] - 1) * 8 + 1, size[1] * 32, size[2] * 32
    one = PassPlan("pass1", height, width, frames, (1.0,), (Guidance(),))
    return Plan((one,), Target(height, width, frames), 30.0, 0.0, 0.05, 0.025)


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_sliced_decode_is_the_whole_one(kind: str, padding: str) -> None:
    """From one column a slice, down to which any memory leads, to nothing cut."""
    vae = built(KINDS[kind])
    for layer in vae.decoder.modules():
        if isinstance(layer, torch.nn.Conv3d) and layer.kernel_size[1] > 1:
            layer.padding_mode = "reflect" if padding == "reflect" else "zeros"
    for size in SIZES if padding == "zeros" else SIZES[:2]:
        given, level = latents(size), torch.tensor([0.05]) if vae.config.timestep_conditioning else None
        expected = vae.decode(given, level, return_dict=False)[0]
        counts = []
        for work_bytes in (1, 30_000, 150_000, 700_000, 10**9):
            parts = list(decode_in_slices(vae.decoder, given, level, work_bytes))
            found = torch.cat(parts, sliced_axis(given.shape))
            assert found.shape == expected.shape
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
            counts.append(len(parts))
        assert counts == sorted(counts, reverse=True) and counts[-1] == 1


@pytest.mark.parametrize("to_host", [False, True])
@torch.inference_mode()
def test_a_row_is_the_same_from_slices(to_host: bool) -> None:
    vae, size = built(VAE), (3, 2, 5)
    whole, sliced = (
        torch.cat(list(decode_row(vae, latents(size), plan(size), row_noise(7), slices)), dim=2)
        for slices in (None, Slices(50_000, to_host))
    )
    assert whole.shape == (1, 3, 17, 64, 160)
    assert (whole - sliced).abs().max() < 1e-5


@torch.inference_mode()
def test_a_decoder_that_draws_noise_draws_it_by_the_row_and_the_slices() -> None:
    vae, size = built(NOISY), (2, 2, 6)
    whole = decode_latents(vae, latents(size), plan(size), row_noise(3))
    first, again, other = (
        decode_latents(vae, latents(size), plan(size), row_noise(seed), Slices(300_000)) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first, whole) and first.shape == whole.shape
    torch.manual_seed(1)
    before = torch.get_rng_state()
    decode_latents(vae, latents(size), plan(size), row_noise(3), Slices(300_000))
    assert torch.equal(before, torch.get_rng_state()), "the process's own noise goes on as it was"


# memory


# The decoder of releases 0.9.5 to 0.9.8, whose sizes the memory model has.
REAL = {
    **VAE,
    "latent_channels": 128,
    "decoder_block_out_channels": (256, 512, 1024),
    "decoder_layers_per_block": (5, 5, 5, 5),
}
HD, UHD = (16, 28, 50), (5, 90, 158)


def real(dtype: torch.dtype) -> Any:
    """Without memory: what its layers would make is counted, not made."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return AutoencoderKLLTXVideo(**REAL).decoder.eval()
    finally:
        torch.set_default_dtype(usual)


SIZES_13B = ModelSizes((1,), 1, 1, 1, 1, channels=4096, number_bytes=2)


@pytest.mark.parametrize(
    ("dtype", "size", "work_gib"),
    [
        (torch.bfloat16, HD, 3.0),
        (torch.bfloat16, HD, 0.8),
        (torch.bfloat16, UHD, 4.0),
        (torch.bfloat16, UHD, 1.0),
        (torch.float32, HD, 2.0),
    ],
)
def test_a_sliced_decode_takes_what_is_predicted(
    dtype: torch.dtype, size: tuple[int, int, int], work_gib: float
) -> None:
    decoder = real(dtype)
    sizes = replace(SIZES_13B, number_bytes=dtype.itemsize)
    given, level = torch.empty(1, 128, *size, device="meta", dtype=dtype), torch.empty(1, device="meta")
    work_bytes = int(work_gib * 2**30)
    with torch.no_grad(), Live(given, *decoder.parameters()) as live:
        for part in decode_in_slices(decoder, given, level, work_bytes):
            del part
    predicted = memory.sliced_decode_bytes(sizes, plan(size).passes[0], work_bytes)
    assert 0.7 * predicted < live.peak < predicted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_slice_works_with_more_than_it_may(dtype: torch.dtype) -> None:
    """Layer by layer: what `SLICE_WORK` says is what is counted."""
    decoder, level = real(dtype), torch.empty(1, device="meta")
    length, given = 10, torch.empty(1, 128, 5, 6, 10, device="meta", dtype=dtype)
    for step in decoder_steps(decoder, level, dtype.itemsize):
        with torch.no_grad(), Live(*decoder.parameters()) as live:
            live._count(given.untyped_storage())
            out = step.call(given)
            small = 2**24  # matrices of the timestep
            assert live.peak <= step.work * given.nbytes + small
        length *= step.scale
        assert out.shape[4] == length
        given = torch.empty(out.shape, device="meta", dtype=dtype)
    assert given.shape == (1, 3, 33, 192, 320)
