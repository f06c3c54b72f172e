"""bnb-int8 on the CPU: which layers are swapped, what they cost, and how far they are off."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.errors import PrecisionError
from ltx_batch.model.checkpoint import load_checkpoint
from ltx_batch.model.pipeline import weights_bytes
from ltx_batch.model.quantize.bnb import quantize_blocks
from ltx_batch.model.quantize.policy import precision
from tests.tiny_checkpoint import write_tiny_checkpoint

CPU = torch.device("cpu")
REQUEST = RenderRequest(prompt="a red circle", height=64, width=96, num_frames=17, timesteps=(1.0, 0.7, 0.4))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Any:
    return load_checkpoint(tiny, torch.float32).transformer


@pytest.fixture
def transformer(loaded: Any) -> Any:
    return copy.deepcopy(loaded)


def quantized(transformer: Any) -> list[str]:
    return [name for name, layer in transformer.named_modules() if type(layer).__name__ == "Linear8bitLt"]


def test_every_linear_layer_of_the_blocks_is_swapped_and_no_other(transformer: Any) -> None:
    before = weights_bytes(transformer)
    inside = sum(layer.weight.numel() for name, layer in transformer.named_modules() if _in_block(name, layer))
    rows = sum(layer.weight.shape[0] for name, layer in transformer.named_modules() if _in_block(name, layer))
    found = quantize_blocks(transformer, precision("bnb-int8", "cpu"), CPU)
    assert found == {"quantized_layers": 20, "skipped_layers": 0, "llm_int8_threshold": 0.0}
    assert len(quantized(transformer)) == 2 * 10
    assert all(name.startswith("transformer_blocks.") for name in quantized(transformer))
    assert all(transformer.get_submodule(name).weight.dtype == torch.int8 for name in quantized(transformer))
    # One byte for four a weight, and an fp32 scale a row.
    assert weights_bytes(transformer) == before - 3 * inside + 4 * rows


def _in_block(name: str, layer: Any) -> bool:
    return isinstance(layer, torch.nn.Linear) and name.startswith("transformer_blocks.")


def test_skipped_layers_stay(transformer: Any) -> None:
    policy = precision("bnb-int8", "cpu", skip=("ff.net.2", "transformer_blocks.1.attn2"))
    found = quantize_blocks(transformer, policy, CPU)
    assert (found["quantized_layers"], found["skipped_layers"]) == (14, 6)
    assert not any("ff.net.2" in name or "1.attn2" in name for name in quantized(transformer))


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (("transformer_blocks",), "would quantise nothing: 20 linear layers in the blocks, all skipped"),
        (("ff.net.3",), "skip_modules: ff.net.3 matches no linear layer"),
        (("proj_out",), "skip_modules: proj_out matches no linear layer"),
    ],
)
def test_quantising_nothing_and_patterns_that_match_nothing_are_errors(
    transformer: Any, skip: tuple[str, ...], message: str
) -> None:
    with pytest.raises(PrecisionError, match=message):
        quantize_blocks(transformer, precision("bnb-int8", "cpu", skip=skip), CPU)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("layer", ["attn1.to_q", "ff.net.2"])
def test_a_quantised_layer_is_near_the_layer_it_replaces(transformer: Any, layer: str, threshold: float) -> None:
    name = f"transformer_blocks.0.{layer}"
    before = copy.deepcopy(transformer.get_submodule(name))
    quantize_blocks(transformer, precision("bnb-int8", "cpu", threshold=threshold), CPU)
    after = transformer.get_submodule(name)
    assert after.state.threshold == threshold
    inputs = torch.randn(40, before.in_features, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = before(inputs), after(inputs)
    assert 0 < (found - expected).norm() / expected.norm() < 0.03


def test_a_quantised_render_is_near_fp32_and_always_the_same(tiny: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "precision": "bnb-int8", "llm_int8_threshold": 0.0}
    plain = load_renderer(str(tiny), device="cpu").render([REQUEST])[0]
    renderer = load_renderer(str(tiny), skip_modules=["attn2.to_k"], **options)
    clip = renderer.render([REQUEST])[0]
    assert clip.ran["precision"] == renderer.precision == "bnb-int8"
    assert (clip.ran["quantized_layers"], clip.ran["skipped_layers"]) == (18, 2)
    error = np.abs(clip.frames.astype(float) - plain.frames).mean()
    assert 0 < error < 0.1 * plain.frames.std()
    again = load_renderer(str(tiny), skip_modules=["attn2.to_k"], **options)
    assert (
        again.render([REQUEST])[0].frames_sha256()
        == clip.frames_sha256()
        == renderer.render([REQUEST])[0].frames_sha256()
    )
    # The scales move from the weights to the layers' state at the first call, and are counted all the same.
    assert weights_bytes(renderer._pipeline.transformer) == renderer.weights_bytes["transformer"]
