"""How media are prepared, against a plain transcription of LTX-Video's ltx_video/inference.py in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ltx_batch.errors import InvalidRow, MediaError
from ltx_batch.media import compress_frames
from ltx_batch.model.plan import Target
from ltx_batch.model.preprocess import _blur, crop_box, prepare_input_media, prepare_media, preprocess_request
from ltx_batch.request import Condition, Prepared, RenderRequest

SIZES = [
    ((300, 401), (256, 256)),
    ((201, 97), (64, 96)),
    ((64, 96), (60, 90)),
    ((120, 176), (110, 162)),
    ((50, 600), (128, 96)),
]


def pictures(count: int, height: int, width: int) -> np.ndarray:
    random = np.random.default_rng(height * width)
    rows, columns = np.mgrid[:height, :width]
    base = np.stack([columns * 255 / width, rows * 255 / height, 127 + 100 * np.sin(columns / 9 + rows / 13)], -1)
    noisy = base + random.normal(0, 12, (count, height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


# the official steps, one frame at a time


def official_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    input_width, input_height = image.size
    aspect, found = width / height, input_width / input_height
    if found > aspect:
        new_width, new_height = int(input_height * aspect), input_height
        x, y = (input_width - new_width) // 2, 0
    else:
        new_width, new_height = input_width, int(input_width / aspect)
        x, y = 0, (input_height - new_height) // 2
    return image.crop((x, y, x + new_width, y + new_height))


def official_blur(frame: np.ndarray) -> np.ndarray:
    """Values 0..255 in float64, before they are cut to uint8."""
    line = np.exp(-0.5 * np.array([-1.0, 0.0, 1.0]) ** 2)
    line /= line.sum()
    padded = np.pad(frame.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="reflect")
    blurred = np.zeros(frame.shape)
    for i, j in np.ndindex(3, 3):
        blurred += line[i] * line[j] * padded[i : i + frame.shape[0], j : j + frame.shape[1]]
    return blurred


def official_cut(frame: np.ndarray) -> np.ndarray:
    """The blurred frame in uint8. Sums in float32 fall to either side of a whole number, and H.264 makes much of one level:
    there, and only there, the side is taken from the code under test."""
    exact = official_blur(frame)
    whole = np.rint(exact)
    unsure = np.abs(exact - whole) < 1e-3
    assert unsure.mean() < 0.2
    return np.where(unsure, np.clip(_blur(frame), whole - 1, whole), np.floor(exact)).astype(np.uint8)


def official_pads(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    down, across = ((height - 1) // 32 + 1) * 32 - height, ((width - 1) // 32 + 1) * 32 - width
    return (down // 2, down - down // 2), (across // 2, across - across // 2)


def official_frame(frame: np.ndarray, height: int, width: int, *, just_crop: bool) -> np.ndarray:
    """[H, W, 3] in float64."""
    image = official_crop(Image.fromarray(frame), height, width)
    if not just_crop:
        image = image.resize((width, height))
    compressed = compress_frames(official_cut(np.asarray(image))[None])[0]
    return np.pad(compressed / 127.5 - 1.0, (*official_pads(height, width), (0, 0)))


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_the_crop_is_the_official_one(source: tuple[int, int], size: tuple[int, int]) -> None:
    for height in range(source[0], source[0] + 7):
        frame = pictures(1, height, source[1])[0]
        left, top, wide, tall = crop_box(height, source[1], Target(*size, 9))
        expected = np.asarray(official_crop(Image.fromarray(frame), *size))
        assert np.array_equal(frame[top : top + tall, left : left + wide], expected)


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_conditions_are_blurred_compressed_and_padded_at_their_own_size(
    source: tuple[int, int], size: tuple[int, int]
) -> None:
    frames = pictures(9, *source)
    pixels = prepare_media(frames, 0, 1.0, Target(*size, 9), "official").pixels
    expected = np.stack([official_frame(frame, *size, just_crop=True) for frame in frames])
    found = pixels[0].permute(1, 2, 3, 0).numpy()
    assert pixels.dtype == torch.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize(("source", "size"), SIZES)
def test_input_media_are_brought_to_the_clips_size_first(source: tuple[int, int], size: tuple[int, int]) -> None:
    target = Target(*size, 8)  # rendered as 9 frames
    frames = pictures(11, *source)
    found = prepare_input_media(frames, target, "official")
    assert found.shape == (1, 3, 9, target.padded_height, target.padded_width)
    expected = np.stack([official_frame(frame, *size, just_crop=False) for frame in frames[:9]])
    assert np.abs(found[0].permute(1, 2, 3, 0).numpy() - expected).max() < 1e-6


def test_the_blur_is_the_official_one() -> None:
    frame = pictures(1, 40, 56)[0]
    exact = official_blur(frame)
    sure = np.abs(exact - np.rint(exact)) > 1e-3
    assert sure.mean() > 0.9
    assert np.array_equal(_blur(frame)[sure], np.floor(exact)[sure])
    assert np.abs(_blur(frame) - exact).max() <= 1.001


def test_without_preprocessing_input_media_are_only_cropped_resized_and_padded() -> None:
    target, frames = Target(60, 90, 9), pictures(9, 100, 101)
    found = prepare_input_media(frames, target, "none")[0].permute(1, 2, 3, 0).numpy()
    for frame, one in zip(frames, found, strict=True):
        sized = np.asarray(official_crop(Image.fromarray(frame), 60, 90).resize((90, 60), Image.Resampling.BICUBIC))
        assert np.allclose(one[2:62, 3:93], sized / 127.5 - 1, atol=1e-6)
        assert one.sum() == pytest.approx(one[2:62, 3:93].sum(), abs=1e-3)


def test_media_of_the_clips_size_keep_every_value() -> None:
    frames = pictures(9, 64, 96)
    found = prepare_input_media(frames, Target(64, 96, 9), "none")
    assert np.array_equal(((found + 1) * 127.5).round().byte()[0].permute(1, 2, 3, 0).numpy(), frames)


def test_each_frame_is_prepared_as_if_it_were_alone() -> None:
    frames, target = pictures(17, 60, 80), Target(64, 96, 17)
    together = prepare_media(frames, 0, 1.0, target, "official").pixels
    for place in (0, 7, 16):
        one = prepare_media(frames[place : place + 1], 0, 1.0, target, "official").pixels
        assert torch.equal(one[:, :, 0], together[:, :, place])


def test_preparing_twice_gives_the_same_bits() -> None:
    frames, target = pictures(9, 70, 111), Target(64, 96, 9)
    for preprocess in ("none", "official"):
        first, second = (prepare_media(frames, 0, 1.0, target, preprocess).pixels for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(*(prepare_input_media(frames, target, preprocess) for _ in range(2)))


@pytest.mark.parametrize("preprocess", ["none", "official"])
def test_nothing_is_left_for_the_turn_of_a_request(preprocess: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frames, target = pictures(9, 70, 111), Target(60, 96, 9)
    request = RenderRequest(
        prompt="a", height=60, width=96, num_frames=9, conditions=(Condition(frames),), input_media=Condition(frames)
    )
    plain = prepare_media(frames, 0, 1.0, target, preprocess).pixels, prepare_input_media(frames, target, preprocess)

    def prepared() -> list[Prepared]:
        found = preprocess_request(request, preprocess)
        media = [condition.media for condition in (*found.conditions, found.input_media) if condition]
        return [one for one in media if isinstance(one, Prepared)]

    def finished(given: Prepared, begin: Prepared) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = prepare_media(given, 0, 1.0, target, preprocess).pixels
        return pixels, prepare_input_media(begin, target, preprocess)

    ready = prepared()
    assert [one.frames.dtype for one in ready] == [np.float32] * 2
    assert all(map(torch.equal, finished(*ready), plain))
    assert np.shares_memory(finished(*ready)[0].numpy(), ready[0].frames)
    monkeypatch.setattr("ltx_batch.model.preprocess.AHEAD_BYTES", 0)
    assert [one.frames.dtype for one in prepared()] == [np.uint8] * 2, "what is too large waits as it is"
    assert all(map(torch.equal, finished(*prepared()), plain))


def test_an_odd_size_still_fills_the_padded_clip() -> None:
    found = prepare_input_media(pictures(1, 61, 91), Target(61, 91, 1), "official")
    assert found.shape == (1, 3, 1, 64, 96)
    assert found[..., 1:61, 2:92].abs().min(dim=1).values.mean() > 0.01
    assert (found[..., 61:, :] == 0).all() and (found[..., 92:] == 0).all()


@pytest.mark.parametrize(
    ("count", "num_frames", "message"),
    [
        (1, 17, "the input media is a picture, and the clip has 17 frames, which take 17: .* num_frames 1 or less"),
        (16, 16, "has 16 frames, and the clip has 16 frames, which take 17: .* num_frames 9 or less"),
        (8, 9, "has 8 frames, and the clip has 9 frames, which take 9"),
    ],
)
def test_input_media_that_are_too_short_are_told(count: int, num_frames: int, message: str) -> None:
    with pytest.raises(MediaError, match=message):
        prepare_input_media(pictures(count, 64, 96), Target(64, 96, num_frames), "none")


def test_what_cannot_be_prepared_is_told() -> None:
    target = Target(64, 96, 17)
    with pytest.raises(MediaError, match="media of 1x500 pixels leave 1x0 when cropped to the shape of 96x64"):
        prepare_media(pictures(1, 500, 1), 0, 1.0, target, "official")
    with pytest.raises(MediaError, match=r"uint8 RGB \[F, H, W, 3\], found float64"):
        prepare_input_media(np.zeros((17, 64, 96, 3)), target, "none")
    with pytest.raises(InvalidRow, match="must start at a multiple of 8, found frame 4; a picture may start at any"):
        prepare_media(pictures(9, 64, 96), 4, 1.0, target, "official")
    assert prepare_media(pictures(8, 64, 96), 4, 1.0, target, "none").pixels.shape[2] == 1
