"""The key: what must change it, and what must not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import ItemsView
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ltx_batch.request import Condition, Keys, RenderRequest, canonical

BASE = RenderRequest(prompt="a red circle moves right", height=128, width=128, num_frames=17, seed=7)
RECIPE = {"schema": 1, "precision": "fp32", "video": {"crf": 18}}
IMAGE = Condition("first.png", 0, 1.0, "ab" * 32)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a red circle moves left"},
        {"negative_prompt": ""},
        {"seed": 8},
        {"height": 160},
        {"width": 160},
        {"num_frames": 25},
        {"frame_rate": 24.0},
        {"num_inference_steps": 9},
        {"guidance_scale": 3.0},
        {"stg_scale": 1.0},
        {"timesteps": (1.0, 0.5)},
        {"image_cond_noise_scale": 0.1},
        {"decode_timestep": 0.1},
        {"decode_noise_scale": 0.1},
        {"conditions": (IMAGE,)},
        {"input_media": IMAGE},
    ],
)
def test_everything_that_changes_the_video_changes_the_key(change: dict) -> None:
    assert replace(BASE, **change).key(RECIPE) != BASE.key(RECIPE)


@pytest.mark.parametrize("change", [{"start_frame": 8}, {"strength": 0.5}, {"media_sha256": "cd" * 32}])
def test_everything_in_a_condition_changes_the_key(change: dict) -> None:
    one = replace(BASE, conditions=(IMAGE,))
    assert replace(BASE, conditions=(replace(IMAGE, **change),)).key(RECIPE) != one.key(RECIPE)


def test_media_count_by_their_bytes_and_not_by_their_path() -> None:
    here, there = (replace(BASE, conditions=(replace(IMAGE, media=path),)) for path in ("a.png", "s3://b/c.png"))
    assert here.key(RECIPE) == there.key(RECIPE)


def test_media_that_nobody_hashed_has_no_key() -> None:
    with pytest.raises(ValueError, match=r"first\.png"):
        replace(BASE, conditions=(Condition("first.png"),)).key(RECIPE)


def test_arrays_are_hashed_by_shape_and_pixels() -> None:
    pixels = np.zeros((1, 4, 4, 3), np.uint8)
    keys = {
        replace(BASE, conditions=(Condition(array),)).key(RECIPE)
        for array in (pixels, pixels + 1, pixels.reshape(1, 2, 8, 3))
    }
    assert len(keys) == 3


def test_the_recipe_changes_the_key() -> None:
    assert BASE.key({**RECIPE, "precision": "bf16"}) != BASE.key(RECIPE)


def test_how_a_number_was_written_does_not_change_the_key() -> None:
    spellings = [
        replace(BASE, frame_rate=value, guidance_scale=scale)
        for value, scale in ((25, 1.1), (25.0, np.float32(1.1)), (np.float64(25), float(np.float32(1.1))))
    ]
    assert len({request.key(RECIPE) for request in spellings}) == 1


def test_a_field_at_its_default_is_left_out_so_that_new_fields_keep_old_keys() -> None:
    # A fixed point: if this changes, every key of every output in the world changes with it.
    assert BASE.key(RECIPE) == "d8ac805181de5d209ac078086e32d5a783ff23d7fb4c6e98da2e23a7834492a8"
    assert replace(BASE, frame_rate=30).key(RECIPE) == BASE.key(RECIPE)


def test_many_keys_of_one_recipe_read_it_once() -> None:
    class Read(dict[str, object]):
        times = 0

        def items(self) -> ItemsView[str, object]:
            self.times += 1
            return super().items()

    recipe = Read(RECIPE, checkpoint={"files": {"\u00e9": "ab" * 32}})
    requests = [
        replace(BASE, seed=seed, prompt=f"\u00e9 {seed}", conditions=(IMAGE,) * (seed % 2)) for seed in range(9)
    ]
    keys = Keys(recipe)
    assert [keys.of(request) for request in requests] == [request.key(dict(recipe)) for request in requests]
    assert recipe.times == 1
    payload = {"request": {"prompt": "a", "seed": 7}, "recipe": dict(recipe)}
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"))
    assert keys.of(RenderRequest(prompt="a", seed=7)) == hashlib.sha256(text.encode()).hexdigest()


def test_canonical_floats_are_float32s_shortest_form() -> None:
    assert [canonical(value) for value in (0.15, 1 / 3, 30.0, np.float32(0.1))] == [0.15, 0.33333334, 30, 0.1]
    assert isinstance(canonical(30.0), int)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"prompt": "other"}, True),
        ({"seed": 1}, True),
        ({"height": 160}, False),
        ({"frame_rate": 24.0}, False),
        ({"guidance_scale": 3.0}, False),
        ({"conditions": (IMAGE,)}, False),
    ],
)
def test_batch_key_holds_what_one_forward_pass_must_share(change: dict, same: bool) -> None:
    assert (replace(BASE, **change).batch_key() == BASE.batch_key()) is same


def test_batch_key_ignores_which_picture_it_is() -> None:
    first, second = (replace(BASE, conditions=(replace(IMAGE, media_sha256=x),)) for x in ("aa", "bb"))
    assert first.batch_key() == second.batch_key()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"input_media": "x.mp4"}, r"input_media must be Condition\(media\), found 'x.mp4'"),
        ({"input_media": np.zeros((1, 8, 8, 3), np.uint8)}, "input_media .*found ndarray"),
        ({"conditions": ("x.png",)}, r"conditions must hold Condition\(media, start_frame, strength\), found 'x.png'"),
        ({"conditions": Condition("x.png")}, r"conditions must be a tuple of Condition\(media\), found Condition"),
    ],
)
def test_media_must_come_as_conditions(given: dict[str, Any], told: str) -> None:
    with pytest.raises(TypeError, match=told):
        RenderRequest(prompt="a", **given)
