"""LoRA files in a request: how they are written, and what they do to the key."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from ltx_batch.request import LoraRef, RenderRequest, parse_lora

BASE = RenderRequest(prompt="a red circle moves right", height=128, width=128, num_frames=17, seed=7)
RECIPE = {"schema": 1, "precision": "fp32", "video": {"crf": 18}}
STYLE, MOTION = LoraRef("style.safetensors", 0.8, "ab" * 32), LoraRef("s3://b/motion.safetensors", 1.0, "cd" * 32)


def key(*loras: LoraRef) -> str:
    return replace(BASE, loras=loras).key(RECIPE)


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("a/style.safetensors:0.8", "a/style.safetensors", 0.8),
        ("s3://bucket/style.safetensors", "s3://bucket/style.safetensors", 1.0),
        ("s3://bucket/style.safetensors:-1", "s3://bucket/style.safetensors", -1.0),
        ("http://host:8080/a.safetensors:1e-1", "http://host:8080/a.safetensors", 0.1),
        ("a:b/c.safetensors", "a:b/c.safetensors", 1.0),
        ("take:2.safetensors:1", "take:2.safetensors", 1.0),
    ],
)
def test_a_lora_is_a_path_with_or_without_a_weight(text: str, path: str, weight: float) -> None:
    assert parse_lora(text) == LoraRef(path, weight)


@pytest.mark.parametrize("text", ["a.safetensors:nan", "a:inf", "a:", "a:x", "a:1e39", "take:2.safetensors"])
def test_what_follows_the_colon_is_a_finite_number(text: str) -> None:
    with pytest.raises(ValueError, match="finite number"):
        parse_lora(text)


@pytest.mark.parametrize("text", ["", " ", "folder/", ":0.5", "s3://bucket/:0.5"])
def test_a_lora_names_a_file(text: str) -> None:
    with pytest.raises(ValueError, match="names no file"):
        parse_lora(text)


def test_a_request_without_a_lora_keeps_its_old_key() -> None:
    # The fixed point of test_request.py: the field came later.
    assert key() == "d8ac805181de5d209ac078086e32d5a783ff23d7fb4c6e98da2e23a7834492a8"


def test_the_key_of_a_request_with_loras_is_a_fixed_point() -> None:
    request = (
        f'{{"height":128,"loras":[["{"ab" * 32}",0.8],["{"cd" * 32}",1]],"num_frames":17,'
        '"prompt":"a red circle moves right","seed":7,"width":128}'
    )
    recipe = '{"precision":"fp32","schema":1,"video":{"crf":18}}'
    text = f'{{"recipe":{recipe},"request":{request}}}'
    assert key(STYLE, MOTION) == hashlib.sha256(text.encode()).hexdigest()


def test_file_and_weight_change_the_key() -> None:
    others = [replace(STYLE, weight=0.7), replace(STYLE, sha256="ef" * 32)]
    assert len({key(), key(STYLE), key(MOTION), key(STYLE, MOTION), *map(key, others)}) == 6


def test_a_lora_counts_by_its_bytes_and_its_float32_weight() -> None:
    assert key(STYLE) == key(replace(STYLE, path="/elsewhere/x.safetensors", weight=float(np.float32(0.8)), data=b"x"))


def test_the_order_of_loras_changes_nothing() -> None:
    one, two = (replace(BASE, loras=loras) for loras in ((STYLE, MOTION), (MOTION, STYLE)))
    assert (one.key(RECIPE), one.batch_key(), one.lora_set) == (two.key(RECIPE), two.batch_key(), two.lora_set)


@pytest.mark.parametrize("weight", [0.0, -0.0, 1e-60])
def test_a_lora_of_weight_zero_is_none(weight: float) -> None:
    none = replace(BASE, loras=(replace(STYLE, weight=weight),))
    assert none.key(RECIPE) == key() and none.batch_key() == BASE.batch_key() and none.lora_set == ()


def test_rows_of_other_loras_do_not_share_a_batch() -> None:
    sets = [(), (STYLE,), (MOTION,), (STYLE, MOTION), (replace(STYLE, weight=0.7),)]
    assert len({replace(BASE, loras=loras).batch_key() for loras in sets}) == len(sets)


def test_a_lora_that_nobody_hashed_has_no_key() -> None:
    with pytest.raises(ValueError, match=r"style\.safetensors must be hashed"):
        key(LoraRef("style.safetensors"))
