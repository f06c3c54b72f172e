"""The demo world: what is drawn is what its caption says, and the reader that judges the checkpoint reads it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from benchmarks.demo_checkpoint import captions, draw, world
from benchmarks.demo_checkpoint.reader import Reading, read

SIZES = [(128, 128, 17), (64, 64, 25), (160, 96, 17), (96, 160, 17), (192, 320, 17)]


def scenes(count: int, height: int, width: int, frames: int, *, held_out: bool = False) -> world.Scenes:
    generator = torch.Generator().manual_seed(height * width + frames)
    return world.sample_scenes(count, height, width, frames, held_out=held_out, generator=generator)


@pytest.mark.parametrize(("height", "width", "frames"), SIZES)
def test_the_reader_reads_what_was_drawn(height: int, width: int, frames: int) -> None:
    drawn = scenes(20, height, width, frames)
    clips = draw.to_uint8(draw.draw(drawn)[0]).numpy()
    truths = [world.combination_names(number)[:4] for number in drawn.combination.tolist()]
    found = [read(clip) for clip in clips]
    assert all(reading.whole for reading in found)
    wrong = [
        (truth, reading)
        for truth, reading in zip(truths, found, strict=True)
        if (reading.shape, reading.colour, reading.direction, reading.background) != truth
    ]
    assert len(wrong) == 0, wrong


def test_the_reader_sees_no_shape_where_there_is_none() -> None:
    plain = np.full((17, 64, 64, 3), world.BACKGROUNDS["sand"], np.uint8)
    assert read(plain) == Reading(None, None, None, "sand")


def test_a_shape_that_is_torn_doubled_or_gone_is_not_whole() -> None:
    clip = draw.to_uint8(draw.draw(scenes(1, 128, 128, 17))[0]).numpy()[0]
    gone = clip.copy()
    doubled = np.where(np.abs(clip.astype(int) - clip[0, 0, 0]).sum(-1, keepdims=True) > 60, clip, clip[:, ::-1, ::-1])
    gone[12:] = clip[0, 0, 0]
    assert read(clip).whole
    assert not read(doubled).whole
    assert not read(gone).whole


def test_a_shape_that_stands_still_has_no_direction() -> None:
    drawn = scenes(1, 128, 128, 17)
    clip = draw.to_uint8(draw.draw(drawn)[0]).numpy()[0]
    assert read(np.repeat(clip[:1], 17, axis=0)).direction is None


@pytest.mark.parametrize(("height", "width", "frames"), SIZES)
def test_shapes_stay_in_the_frame_and_move_far_enough(height: int, width: int, frames: int) -> None:
    drawn = scenes(24, height, width, frames)
    cover = draw.draw(drawn)[1][:, :, :: frames - 1]  # the ends of a straight way are its extremes
    edges = torch.cat([cover[..., 0, :], cover[..., -1, :], cover[..., :, 0], cover[..., :, -1]], dim=-1)
    assert edges.max() < 0.1, "an outermost pixel may catch a breath of the soft edge, no more"
    assert scenes(500, height, width, frames).path.norm(dim=1).min() >= 0.15


def test_one_combination_in_ten_is_held_out_and_never_trained() -> None:
    share = world.HELD_OUT.float().mean().item()
    assert 0.07 < share < 0.13
    assert not any(world.is_held_out(number) for number in scenes(500, 64, 64, 9).combination.tolist())
    assert all(world.is_held_out(number) for number in scenes(500, 64, 64, 9, held_out=True).combination.tolist())


def test_captions_name_shape_colour_and_direction_in_both_word_orders() -> None:
    rng = random.Random(0)
    names = ("square", "blue", "up", "dark", "small", "slow")
    texts = [captions.caption(names, rng).lower() for _ in range(2000)]
    assert all(any(word in text for word in captions.SHAPE_WORDS["square"]) for text in texts)
    assert all("blue" in text for text in texts)
    assert all("up" in text or "top" in text for text in texts)
    shape_first = [text for text in texts if "square" in text and text.index("blue") > text.index("square")]
    assert 200 < len(shape_first) < 1800
    assert sum(text.startswith(("on ", "over ", "against ")) for text in texts) > 50


def test_at_least_a_dozen_verbs_are_written() -> None:
    rng = random.Random(0)
    texts = " ".join(captions.caption(("star", "red", "left", "white", "large", "fast"), rng) for _ in range(3000))
    assert sum(going in texts for _, going in captions.VERBS) >= 12
