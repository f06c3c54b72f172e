"""How media become tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ltx_batch.model.checkpoint import load_checkpoint
from ltx_batch.model.conditioning import Tokens, encode_media, start_tokens
from ltx_batch.model.frames import trimmed_frames
from ltx_batch.model.latents import from_tokens, normalize, to_tokens, token_coords, unnormalize
from ltx_batch.model.noise import row_noise
from ltx_batch.model.pipeline_config import PipelineConfig
from ltx_batch.model.plan import Plan, plan_request
from ltx_batch.model.preprocess import prepare_media
from ltx_batch.model.sigmas import SchedulerConfig
from ltx_batch.request import RenderRequest
from tests.tiny_checkpoint import LATENT_CHANNELS, write_tiny_checkpoint


def make_plan(height: int = 64, width: int = 96, num_frames: int = 33) -> Plan:
    request = RenderRequest(prompt="a", height=height, width=width, num_frames=num_frames, timesteps=(1.0, 0.5))
    return plan_request(request, PipelineConfig.model_validate({}), SchedulerConfig())


def gradient(height: int, width: int) -> np.ndarray:
    """One frame whose red is its column and green its row, both from 0 to 255."""
    rows, columns = np.meshgrid(np.linspace(0, 255, height), np.linspace(0, 255, width), indexing="ij")
    return np.stack([columns, rows, np.zeros_like(rows)], axis=-1).round().astype(np.uint8)[None]


# pixels


def test_media_of_the_clips_size_keep_every_value() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), dtype=np.uint8)
    pixels = prepare_media(frames, 0, 1.0, make_plan().target).pixels
    assert pixels.shape == (1, 3, 9, 64, 96)
    assert np.array_equal(((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1)[0].numpy(), frames)
    assert (pixels.min(), pixels.max()) == (-1, 1)


@pytest.mark.parametrize(("height", "width"), [(128, 384), (384, 128), (640, 961)])
def test_media_of_another_shape_are_cropped_around_their_centre(height: int, width: int) -> None:
    pixels = prepare_media(gradient(height, width), 0, 1.0, make_plan().target).pixels[0, :, 0]
    kept_wide, kept_tall = min(1, height * 1.5 / width), min(1, width / 1.5 / height)
    for channel, kept in ((0, kept_wide), (1, kept_tall)):
        line = pixels[channel].mean(channel)  # along columns for red, along rows for green
        assert line[0] == pytest.approx(-kept, abs=0.03)
        assert line[-1] == pytest.approx(kept, abs=0.03)


def test_a_fine_pattern_is_averaged_when_it_shrinks() -> None:
    stripes = np.zeros((1, 640, 960, 3), np.uint8)
    stripes[:, :, ::2] = 255
    inner = prepare_media(stripes, 0, 1.0, make_plan().target).pixels[..., 4:-4]
    assert inner.abs().max() < 0.1


def test_the_pad_is_that_of_the_clip_and_mid_grey() -> None:
    plan = make_plan(60, 91)
    white = np.full((1, 60, 91, 3), 255, np.uint8)
    pixels = prepare_media(white, 0, 1.0, plan.target).pixels
    assert pixels.shape[-2:] == (64, 96)
    inner = pixels[..., 2:62, 2:93]
    assert (inner == 1).all()
    assert pixels.sum() == inner.sum()


@pytest.mark.parametrize(
    ("available", "start", "kept"),
    [(1, 0, 1), (8, 0, 1), (9, 0, 9), (40, 0, 33), (33, 8, 25), (20, 8, 17), (9, 30, 1), (5, 32, 1)],
)
def test_sequences_are_trimmed_to_8k_plus_1_that_fit(available: int, start: int, kept: int) -> None:
    assert trimmed_frames(available, start, 33) == kept


# tokens


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_checkpoint(write_tiny_checkpoint(tmp_path_factory.mktemp("tiny")), torch.float32).vae


def place(vae: Any, *media: tuple[int, int, float]) -> Tokens:
    """Tokens of one row with random media of (frames, start, strength)."""
    plan, random = make_plan(), np.random.default_rng(0)
    items = [
        prepare_media(random.integers(0, 256, (count, 64, 96, 3), dtype=np.uint8), start, strength, plan.target)
        for count, start, strength in media
    ]
    with torch.inference_mode():
        return start_tokens(plan.passes[0], [items], [row_noise(7)], vae, LATENT_CHANNELS, 24.0)


def strengths(tokens: Tokens) -> list[float]:
    """Strength of each latent frame of the clip itself."""
    assert tokens.strengths is not None
    return from_tokens(tokens.strengths[:, tokens.extra :, None], (5, 2, 3))[0, 0, :, 0, 0].tolist()


def test_without_conditions_there_is_only_noise(vae: Any) -> None:
    tokens = place(vae)
    assert tokens.strengths is None and tokens.extra == 0
    assert torch.equal(tokens.latents, row_noise(7)("pass1.init", (1, 30, LATENT_CHANNELS)))


def test_at_frame_0_media_replace_noise(vae: Any) -> None:
    tokens, noise = place(vae, (9, 0, 1.0)), place(vae)
    assert tokens.extra == 0
    assert strengths(tokens) == [1, 1, 0, 0, 0]
    assert torch.equal(tokens.latents[:, 12:], noise.latents[:, 12:])
    assert not torch.isclose(tokens.latents[:, :12], noise.latents[:, :12]).any(2).all()


def test_a_later_frame_becomes_tokens_that_carry_its_time(vae: Any) -> None:
    tokens, noise = place(vae, (1, 13, 0.5)), place(vae)
    assert tokens.extra == 6
    assert strengths(tokens) == [0, 0, 0, 0, 0]
    assert tokens.strengths is not None and tokens.strengths[0, :6].tolist() == [0.5] * 6
    assert torch.equal(tokens.latents[:, 6:], noise.latents)
    assert torch.allclose(tokens.coords[0, 0, :6], torch.tensor(13 / 24.0))
    assert torch.equal(tokens.coords[..., 6:], noise.coords)


def test_of_a_later_sequence_two_latent_frames_become_tokens_and_the_rest_replaces_noise(vae: Any) -> None:
    tokens = place(vae, (25, 8, 1.0))
    assert tokens.extra == 12
    assert strengths(tokens) == [0, 0, 0, 1, 1]
    assert torch.allclose(tokens.coords[0, 0, :12:6], torch.tensor([8 / 24.0, 9 / 24.0]))


def test_extra_tokens_come_in_order_before_the_clip(vae: Any) -> None:
    tokens = place(vae, (1, 0, 1.0), (9, 16, 0.8), (1, 31, 0.4))
    assert tokens.strengths is not None
    assert tokens.strengths[0, :18].tolist() == pytest.approx([0.8] * 12 + [0.4] * 6)
    assert strengths(tokens) == [1, 0, 0, 0, 0]


def test_media_are_sampled_from_what_the_vae_says(vae: Any) -> None:
    plan = make_plan()
    item = prepare_media(gradient(64, 96), 0, 1.0, plan.target)
    distribution = vae.encode(item.pixels).latent_dist
    for level in (0.0, 2.0):
        found = encode_media(
            [item.pixels], plan.passes[0], [lambda name, shape, level=level: torch.full(shape, level)], "x", vae
        )
        torch.testing.assert_close(found, normalize(distribution.mean + level * distribution.std, vae))


# geometry


def test_coordinates_are_those_of_the_official_code() -> None:
    coords = token_coords((3, 2, 2), start_frame=0, frame_rate=8.0, device=torch.device("cpu"))
    assert coords.shape == (1, 3, 12)
    assert coords[0, 0].tolist() == [0.0] * 4 + [0.125] * 4 + [1.125] * 4  # frames 0, 1 and 9
    assert coords[0, 1, :4].tolist() == [0, 0, 32, 32]
    assert coords[0, 2, :4].tolist() == [0, 32, 0, 32]


def test_releases_before_0_9_5_count_eight_frames_for_the_first_latent_too() -> None:
    coords = token_coords((3, 1, 1), start_frame=0, frame_rate=8.0, device=torch.device("cpu"), causal=False)
    assert coords[0, 0].tolist() == [0.0, 1.0, 2.0]


def test_tokens_and_latents_go_back_and_forth(vae: Any) -> None:
    latents = torch.randn(2, LATENT_CHANNELS, 3, 2, 4)
    assert torch.equal(from_tokens(to_tokens(latents), (3, 2, 4)), latents)
    assert torch.equal(to_tokens(latents)[1, 5], latents[1, :, 0, 1, 1])
    torch.testing.assert_close(unnormalize(normalize(latents, vae), vae), latents)
    assert not torch.allclose(normalize(latents, vae), latents)


def test_the_folder_is_a_real_checkpoint(tmp_path: Path) -> None:
    names = {entry.name for entry in write_tiny_checkpoint(tmp_path).iterdir()}
    assert names == {"transformer", "vae", "text_encoder", "tokenizer", "scheduler", "latent_upsampler"}
