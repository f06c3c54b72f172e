"""Short calls recorded as CUDA graphs, on the tiny checkpoint: the same bits as plain calls, whatever changes between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lora_files import random_pairs, write_lora

from ltx_batch import LoraRef, RenderRequest, load_renderer
from ltx_batch.model.graphs import StepGraphs
from ltx_batch.renderer import LtxRenderer
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.gpu

REQUEST = RenderRequest(prompt="a red circle", height=96, width=160, num_frames=17, seed=7)
OTHERS = (
    replace(REQUEST, prompt="a blue square moves left", seed=8),
    replace(REQUEST, prompt="a green triangle " * 30),  # more tokens of the prompt
    replace(REQUEST, height=128, seed=9),
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def loaded(tiny: Path, *, plain: bool, **options: Any) -> LtxRenderer:
    renderer = load_renderer(str(tiny), **{"device": "cuda", "precision": "bf16", "attention": "native", **options})
    if plain:
        renderer._pipeline._graphs._failed = True
    return renderer


def hashes(renderer: LtxRenderer, requests: tuple[RenderRequest, ...]) -> list[str]:
    return [renderer.render([request])[0].frames_sha256() for request in requests]


@pytest.mark.parametrize("precision", ["bf16", "int8", "int8-weight"])
def test_recorded_calls_render_the_same_bits(tiny: Path, precision: str) -> None:
    requests = (REQUEST, *OTHERS, REQUEST, *OTHERS, REQUEST)
    expected = hashes(loaded(tiny, plain=True, precision=precision), requests)
    renderer = loaded(tiny, plain=False, precision=precision)
    assert hashes(renderer, requests) == expected
    graphs = renderer._pipeline._graphs
    assert len(graphs._recorded) >= 2 and not graphs._failed
    batch = [REQUEST, replace(REQUEST, prompt="a dog"), replace(REQUEST, seed=3)]
    plain = loaded(tiny, plain=True, precision=precision).render(batch)
    for _ in range(3):
        assert [c.frames_sha256() for c in renderer.render(batch)] == [c.frames_sha256() for c in plain]


def test_a_lora_file_and_a_move_are_seen(tiny: Path, tmp_path: Path) -> None:
    pairs = random_pairs({f"transformer_blocks.{block}.attn1.to_q": (32, 32) for block in range(2)}, size=0.5)
    lora = LoraRef(write_lora(tmp_path / "lora.safetensors", pairs), 0.8)
    styled = replace(REQUEST, loras=(lora,))
    requests = (REQUEST, REQUEST, styled, styled, REQUEST)
    expected = hashes(loaded(tiny, plain=True, precision="int8"), requests)
    renderer = loaded(tiny, plain=False, precision="int8")
    assert hashes(renderer, requests) == expected
    assert len(set(expected)) == 2
    renderer._pipeline.lodging.leave()
    assert hashes(renderer, requests) == expected


def test_without_memory_to_spare_calls_are_plain(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = loaded(tiny, plain=False, precision="int8")
    expected = hashes(renderer, (REQUEST,))
    monkeypatch.setattr(StepGraphs, "_may_record", lambda *_: False)
    fresh = loaded(tiny, plain=False, precision="int8")
    assert hashes(fresh, (REQUEST, REQUEST)) == expected * 2
    assert not fresh._pipeline._graphs._recorded
    assert renderer._pipeline._graphs.give_up()
    assert hashes(renderer, (REQUEST,)) == expected
