"""Quantised models on the CPU: which layers are swapped, what they cost, and how far off whole renders are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.clip import Clip
from ltx_batch.errors import PrecisionError
from ltx_batch.model.checkpoint import load_checkpoint
from ltx_batch.model.measure import weights_bytes
from ltx_batch.model.quantize import bnb
from ltx_batch.model.quantize.apply import apply_policy
from ltx_batch.model.quantize.policy import precision
from ltx_batch.model.quantize.swap import is_quantized, quantize_convolutions, quantize_model
from tests.tiny_checkpoint import write_tiny_checkpoint

CPU = torch.device("cpu")
KINDS = {
    "int8": "Int8Linear",
    "int8-weight": "Int8WeightLinear",
    "fp8": "Fp8Linear",
    "bnb-int8": "Linear8bitLt",
}
# Wide enough for groups of 64.
WIDE = {"num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128}
REQUEST = RenderRequest(prompt="a red circle", height=64, width=96, num_frames=17, timesteps=(1.0, 0.7, 0.4))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), transformer=WIDE)


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Any:
    return load_checkpoint(tiny, torch.float32).transformer


@pytest.fixture
def transformer(loaded: Any) -> Any:
    return copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def exact(tiny: Path) -> Clip:
    return load_renderer(str(tiny), device="cpu").render([REQUEST])[0]


def swapped(model: Any) -> list[str]:
    return [name for name, layer in model.named_modules() if is_quantized(layer)]


# layers


@pytest.mark.parametrize("name", KINDS)
def test_the_blocks_layers_are_swapped_but_for_the_prompts_keys_and_values(transformer: Any, name: str) -> None:
    before = weights_bytes(transformer)
    found = quantize_model(transformer, precision(name, "cpu"), CPU)
    assert (found["quantized_layers"], found["skipped_layers"]) == (2 * 8, 2 * 2)
    assert found["saved_bytes"] == before - weights_bytes(transformer)
    width = 128
    weights = 2 * (3 + 1 + 2 + 8) * width**2  # query, key, value and out; query and out; feed-forward
    assert 0.9 * 3 * weights < found["saved_bytes"] <= 3 * weights  # one byte for four, and some scales
    assert len(swapped(transformer)) == 16
    assert {type(transformer.get_submodule(name)).__name__ for name in swapped(transformer)} == {KINDS[name]}
    assert not any("attn2.to_k" in name or "attn2.to_v" in name for name in swapped(transformer))
    assert all(name.startswith("transformer_blocks.") for name in swapped(transformer))


def test_what_is_told_of_a_precision(transformer: Any) -> None:
    one, two = copy.deepcopy(transformer), copy.deepcopy(transformer)
    assert quantize_model(one, precision("int8", "cpu", hadamard_group=0), CPU)["hadamard_group"] == 0
    assert quantize_model(two, precision("bnb-int8", "cpu", threshold=6.0), CPU)["llm_int8_threshold"] == 6.0
    assert quantize_model(transformer, precision("fp32", "cpu"), CPU) == {}


def test_counts_and_bytes_are_logged(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "ltx_batch")
    ran = load_renderer(str(tiny), device="cpu", precision="int8").render([REQUEST])[0].ran
    line = next(record.getMessage() for record in caplog.records if record.getMessage().startswith("int8: "))
    assert line == f"int8: quantized_layers 16, skipped_layers 4, hadamard_group 64, saved_bytes {ran['saved_bytes']}"


def test_skipped_layers_stay(transformer: Any) -> None:
    policy = precision("int8", "cpu", skip=("ff.net.2", "transformer_blocks.1.attn2"))
    found = quantize_model(transformer, policy, CPU)
    assert (found["quantized_layers"], found["skipped_layers"]) == (12, 8)
    assert not any("ff.net.2" in name or "1.attn2" in name for name in swapped(transformer))


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", ["int8", "bnb-int8"])
def test_quantising_twice_is_refused(transformer: Any, first: str, second: str) -> None:
    quantize_model(transformer, precision(first, "cpu"), CPU)
    with pytest.raises(PrecisionError, match=r"already \(16 layers, e.g. transformer_blocks.0.attn1.to_q\)"):
        quantize_model(transformer, precision(second, "cpu"), CPU)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("layer", ["attn1.to_q", "ff.net.2"])
def test_a_layer_of_bitsandbytes_is_near_the_layer_it_replaces(transformer: Any, layer: str, threshold: float) -> None:
    name = f"transformer_blocks.0.{layer}"
    before = copy.deepcopy(transformer.get_submodule(name))
    quantize_model(transformer, precision("bnb-int8", "cpu", threshold=threshold), CPU)
    after = transformer.get_submodule(name)
    assert after.state.threshold == threshold
    inputs = torch.randn(40, before.in_features, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = before(inputs), after(inputs)
    assert 0 < (found - expected).norm() / expected.norm() < 0.03
    assert bnb.scale_of(after).shape == (before.out_features,)


@pytest.mark.parametrize("stored", [False, True])
def test_a_layer_of_bitsandbytes_rounds_its_inputs_on_a_cpu_too(stored: bool) -> None:
    """As on a GPU: an input that is small beside the largest of its row is lost, but for the threshold."""
    exact = nn.Linear(64, 16, bias=False)
    x = torch.zeros(4, 64)
    x[:, 0], x[:, 1] = 1000.0, 1.0  # a step of the row is 7.9
    for threshold, seen in ((0.0, False), (6.0, True)):
        layer = bnb.quantized(exact, threshold, CPU)
        if stored:
            blank = bnb.StoredLinear8bit(64, 16, bias=False, dtype=torch.float32)
            for name, tensor in bnb.saved(layer).items():
                setattr(blank, name, tensor)
            layer = blank.restored(threshold, CPU)
        with torch.inference_mode():
            found = layer(x) - layer(torch.where(x == 1, 0.0, x))
        assert bool(found.abs().max() > 0.01) is seen


def test_bitsandbytes_does_not_log_every_call(caplog: pytest.LogCaptureFixture) -> None:
    layer = bnb.quantized(nn.Linear(64, 16), 0.0, CPU)
    layer(torch.ones(2, 64))
    assert not [record for record in caplog.records if "will be cast" in record.getMessage()]


def test_every_convolution_of_a_vae_is_swapped(tiny: Path) -> None:
    vae = load_checkpoint(tiny, torch.float32).vae
    convolutions = sum(isinstance(layer, nn.Conv3d) for layer in vae.modules())
    before = weights_bytes(vae)
    found = quantize_convolutions(vae, CPU)
    assert found == {"quantized_convolutions": convolutions, "saved_bytes": before - weights_bytes(vae)}
    assert convolutions > 10 and found["saved_bytes"] > 0.5 * before
    assert sum(type(layer).__name__ == "Int8WeightConv3d" for layer in vae.modules()) == convolutions


@pytest.mark.parametrize("name", ["int8", "int8-weight", "fp8"])
def test_layers_are_rounded_where_they_will_work_and_lie_where_they_are_at_home(tiny: Path, name: str) -> None:
    loaded = load_checkpoint(tiny, torch.float32)
    apply_policy(loaded.transformer, loaded.vae, precision(name, "cpu"), CPU, home=torch.device("meta"))
    for model in (loaded.transformer, loaded.vae):
        for layer in model.modules():
            held = {tensor.device.type for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))}
            assert held <= ({"meta"} if is_quantized(layer) else {"cpu"})


# renders


@pytest.mark.parametrize(("name", "limit"), [("int8", 0.05), ("int8-weight", 0.06), ("bnb-int8", 0.05), ("fp8", 0.1)])
def test_a_quantised_render_is_near_fp32_and_always_the_same(tiny: Path, exact: Clip, name: str, limit: float) -> None:
    renderer = load_renderer(str(tiny), device="cpu", precision=name)
    clip = renderer.render([REQUEST])[0]
    assert clip.ran["precision"] == renderer.precision == name
    assert (clip.ran["quantized_layers"], clip.ran["skipped_layers"], clip.ran["dtype"]) == (16, 4, "float32")
    error = np.abs(clip.frames.astype(float) - exact.frames).mean() / exact.frames.std()
    assert 0 < error < limit
    again = load_renderer(str(tiny), device="cpu", precision=name).render([REQUEST])[0]
    assert again.frames_sha256() == clip.frames_sha256() == renderer.render([REQUEST])[0].frames_sha256()
    assert renderer.weights_bytes["transformer"] < 0.55 * weights_bytes(
        load_checkpoint(tiny, torch.float32).transformer
    )


def test_settings_reach_the_layers(tiny: Path) -> None:
    renderer = load_renderer(
        str(tiny), device="cpu", precision="int8", hadamard_group=0, keep_blocks=0, skip_modules=["ff.net.2"]
    )
    ran = renderer.render([REQUEST])[0].ran
    assert (ran["quantized_layers"], ran["skipped_layers"], ran["hadamard_group"]) == (14, 6, 0)
    with pytest.raises(PrecisionError, match="would quantise nothing"):
        load_renderer(str(tiny), device="cpu", precision="int8", keep_blocks=1)


def test_rows_of_a_batch_do_not_change_each_other(tiny: Path) -> None:
    renderer = load_renderer(str(tiny), device="cpu", precision="int8")
    requests = [
        RenderRequest(
            prompt=prompt, height=64, width=64, num_frames=9, seed=seed, guidance_scale=3.0, timesteps=(1.0, 0.5)
        )
        for seed, prompt in enumerate(["a red circle", "x", "a blue square moves"])
    ]
    together = renderer.render(requests)
    for request, clip in zip(requests, together, strict=True):
        alone = renderer.render([request])[0]
        assert np.abs(alone.frames.astype(int) - clip.frames).max() <= 1  # products of another size round otherwise
