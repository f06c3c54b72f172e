"""Files that are read while something else is done."""

from __future__ import annotations

import os
from pathlib import Path

from ltx_batch.model.read_ahead import read_ahead
from ltx_batch.model.sources import Sources


def test_files_are_read_in_order_while_the_body_runs(tmp_path: Path) -> None:
    pipes = [tmp_path / "one", tmp_path / "two"]
    for pipe in pipes:
        os.mkfifo(pipe)
    with read_ahead([tmp_path / "missing", *pipes]):
        for pipe in pipes:  # holds 64 KiB: more is taken only by who reads it
            pipe.write_bytes(bytes(2**23))


def test_reading_ends_with_the_body() -> None:
    with read_ahead([Path("/dev/zero")]):
        pass


def test_what_is_loaded_first_is_read_first(tmp_path: Path) -> None:
    for name in ("text_encoder/model.safetensors", "transformer/a.safetensors", "transformer/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    upscaler = tmp_path / "upscaler.safetensors"
    upscaler.touch()
    sources = Sources(str(tmp_path), upsampler=str(upscaler))
    weights = [tmp_path / "transformer" / "a.safetensors", upscaler]
    assert sources.weights_here(with_text=False) == weights
    assert Sources(f"file://{tmp_path}", upsampler=str(upscaler)).weights_here(with_text=False) == weights
    assert sources.weights_here(with_text=True) == [*weights, tmp_path / "text_encoder" / "model.safetensors"]
    alone = tmp_path / "ltx.safetensors"
    alone.touch()
    assert Sources(str(alone), upsampler=str(upscaler)).weights_here(with_text=True) == [alone, upscaler]
    other = tmp_path / "t5"
    (other / "text_encoder").mkdir(parents=True)
    (other / "text_encoder" / "b.safetensors").touch()
    assert Sources(str(tmp_path), text_encoder=str(other)).weights_here(with_text=True) == [
        weights[0],
        other / "text_encoder" / "b.safetensors",
    ], "not the encoder that it has and that is not loaded"
    assert Sources("someone/model", text_encoder="s3://bucket/text").weights_here(with_text=True) == []
