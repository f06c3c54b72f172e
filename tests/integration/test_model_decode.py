"""Latents to frames."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ltx_batch.model.checkpoint import load_checkpoint
from ltx_batch.model.decode import decode_latents, to_uint8
from ltx_batch.model.latents import unnormalize
from ltx_batch.model.noise import row_noise
from ltx_batch.model.plan import Plan, Target
from tests.tiny_checkpoint import LATENT_CHANNELS, VAE, write_tiny_checkpoint


def make_vae(folder: Any, **changes: Any) -> Any:
    return load_checkpoint(write_tiny_checkpoint(folder, vae=changes), torch.float32).vae


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_vae(tmp_path_factory.mktemp("tiny"))


LATENTS = torch.randn(1, LATENT_CHANNELS, 2, 2, 3, generator=torch.Generator().manual_seed(0))


def plan(noise_scale: float) -> Plan:
    return Plan((), Target(64, 96, 9), 24.0, 0.0, decode_timestep=0.05, decode_noise_scale=noise_scale)


def test_pixels_are_rounded_and_clipped() -> None:
    levels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, (100.4 - 127.5) / 127.5, (100.6 - 127.5) / 127.5])
    found = to_uint8(levels.view(1, 1, 1, 1, -1).expand(1, 3, 1, 1, -1))
    assert found.shape == (1, 1, 1, 7, 3)
    assert found[0, 0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 100, 101]


def test_every_byte_comes_back() -> None:
    bytes_ = np.arange(256, dtype=np.uint8)
    video = torch.from_numpy(bytes_).float() / 127.5 - 1
    assert np.array_equal(to_uint8(video.view(1, 1, 1, 1, -1).expand(1, 3, 1, 1, -1))[0, 0, 0, :, 1], bytes_)


def test_noise_is_mixed_into_normalised_latents(vae: Any) -> None:
    noise = row_noise(3)
    drawn = noise("decode", tuple(LATENTS.shape))
    expected = vae.decode(unnormalize(LATENTS * 0.75 + drawn * 0.25, vae), torch.tensor([0.05]), return_dict=False)[0]
    assert torch.equal(decode_latents(vae, LATENTS, plan(0.25), noise), expected)


def test_a_decoder_without_a_timestep_gets_no_noise(tmp_path: Any) -> None:
    plain = make_vae(tmp_path, timestep_conditioning=False)

    def no_noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        raise AssertionError(f"{name} was drawn")

    found = decode_latents(plain, LATENTS, plan(0.25), no_noise)
    assert torch.equal(found, plain.decode(unnormalize(LATENTS, plain), None, return_dict=False)[0])


def test_a_decoder_that_draws_noise_itself_is_seeded_by_the_row(tmp_path: Any) -> None:
    noisy = make_vae(tmp_path, decoder_inject_noise=(True, True, True, False))
    for name, parameter in noisy.named_parameters():
        if "per_channel_scale" in name:
            parameter.fill_(0.5)
    torch.manual_seed(1)
    first = decode_latents(noisy, LATENTS, plan(0.0), row_noise(3))
    state = torch.get_rng_state()
    again, other = (decode_latents(noisy, LATENTS, plan(0.0), row_noise(seed)) for seed in (3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert VAE["decoder_inject_noise"] == (False,) * 4
