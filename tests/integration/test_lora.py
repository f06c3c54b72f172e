"""LoRA files on a tiny transformer: what they add, on which layers how, and that nothing of them stays behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_files import COMFYUI, DIFFUSERS, KOHYA, OFFICIAL, Pair, random_pairs, write_lora
from safetensors.torch import save_file
from torch import nn

from ltx_batch.errors import LoraError
from ltx_batch.lora import LoraCache
from ltx_batch.model.checkpoint import load_checkpoint
from ltx_batch.model.layers import transformer_layers
from ltx_batch.model.lora import Adapter, LoraSwitch, apply_loras, linear_shapes, load_adapter
from ltx_batch.model.measure import weights_bytes
from ltx_batch.model.pipeline import Stopwatch
from ltx_batch.model.quantize.policy import precision
from ltx_batch.model.quantize.swap import quantize_model
from ltx_batch.request import LoraRef
from tests.tiny_checkpoint import write_tiny_checkpoint

CPU = torch.device("cpu")
LAYERS = (
    "proj_in",
    "proj_out",
    "time_embed.linear",
    "caption_projection.linear_1",
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.0.attn2.to_out.0",
    "transformer_blocks.1.ff.net.0.proj",
    "transformer_blocks.1.ff.net.2",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> Any:
    return load_checkpoint(tiny, torch.float32).transformer


@pytest.fixture
def transformer(loaded: Any) -> Any:
    return copy.deepcopy(loaded)


def pairs_for(model: Any, seed: int = 0, **how: Any) -> dict[str, Pair]:
    return random_pairs({name: linear_shapes(model)[name] for name in LAYERS}, seed=seed, **how)


def adapter(path: Path, weight: float = 1.0) -> Adapter:
    return load_adapter(LoraCache().fetch(LoraRef(path, weight)))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def forward(model: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    config, tokens = model.config, 12
    with torch.inference_mode():
        return model(
            hidden_states=torch.randn(2, tokens, config.in_channels, generator=draw).to(model.proj_in.weight.dtype),
            encoder_hidden_states=torch.randn(2, 5, config.caption_channels, generator=draw).to(
                model.proj_in.weight.dtype
            ),
            timestep=torch.full((2, tokens), 700.0),
            encoder_attention_mask=torch.ones(2, 5),
            num_frames=1,
            height=3,
            width=4,
            return_dict=False,
        )[0].float()


# what is added


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("naming", [DIFFUSERS, COMFYUI, KOHYA, OFFICIAL])
def test_fused_weights_are_the_formula_rounded_once(
    tmp_path: Path, transformer: Any, naming: tuple[str, str], dtype: torch.dtype
) -> None:
    transformer.to(dtype)
    before = state(transformer)
    one, two = pairs_for(transformer), pairs_for(transformer, seed=1, rank=5)
    files = [
        adapter(write_lora(tmp_path / "one.safetensors", one, naming, alpha=6), 0.5),
        adapter(write_lora(tmp_path / "two.safetensors", two, naming), -1.25),
    ]
    apply_loras(transformer, files, CPU)
    for name in LAYERS:
        (a1, b1), (a2, b2) = ([half.astype(np.float64) for half in pair[name]] for pair in (one, two))
        exact = before[f"{name}.weight"].double().numpy() + 0.5 * 6 / 3 * b1 @ a1 - 1.25 * b2 @ a2
        found = transformer.get_submodule(name).weight
        assert found.dtype == dtype
        if dtype == torch.float32:
            np.testing.assert_allclose(found.double().numpy(), exact, rtol=0, atol=4e-7 * np.abs(exact).max())
        else:  # one rounding: half a step of bf16's 8 bits, and what fp32 adds to it
            assert (np.abs(found.double().numpy() - exact) <= np.abs(exact) * 2**-8 * 1.01 + 1e-7).all()
    touched = {f"{name}.weight" for name in LAYERS}
    after = state(transformer)
    assert {name for name in after if not torch.equal(after[name], before[name])} == touched


def test_all_namings_of_one_lora_are_one_lora(tmp_path: Path, loaded: Any) -> None:
    outputs = []
    for number, naming in enumerate((DIFFUSERS, COMFYUI, KOHYA, OFFICIAL)):
        model = copy.deepcopy(loaded)
        path = write_lora(tmp_path / f"{number}.safetensors", pairs_for(model), naming)
        with apply_loras(model, [adapter(path)], CPU):
            outputs.append(forward(model))
    assert all(torch.equal(outputs[0], output) for output in outputs[1:])
    assert (outputs[0] - forward(loaded)).norm() > 0.1 * outputs[0].norm()


@pytest.mark.parametrize("kind", ["diffusers", "alpha tensors"])
def test_alpha_by_metadata_and_by_tensors(tmp_path: Path, loaded: Any, kind: str) -> None:
    pairs, told = pairs_for(loaded), {"lora_adapter_metadata": '{"transformer.r": 3, "transformer.lora_alpha": 7.5}'}
    path = tmp_path / "a.safetensors"
    found = adapter(
        write_lora(path, pairs, metadata=told) if kind == "diffusers" else write_lora(path, pairs, KOHYA, alpha=7.5),
        0.8,
    )
    assert {update.scale for update in found.updates.values()} == {float(np.float32(0.8)) * 2.5}


def test_linear_layers_are_those_of_the_checkpoints_header(tiny: Path, loaded: Any) -> None:
    assert transformer_layers(str(tiny)) == linear_shapes(loaded)
    single = tiny / "transformer" / "diffusion_pytorch_model.safetensors"
    assert transformer_layers(str(single)) == transformer_layers(f"file://{tiny}") == linear_shapes(loaded)
    assert transformer_layers("someone/model") is transformer_layers(str(tiny / "gone")) is None


# fused and applied


class Held(nn.Linear):
    """A linear layer that is none of the plain ones."""


def hold(model: nn.Module) -> int:
    """Make every layer of the blocks one that takes no sums."""
    layers = [layer for name, layer in model.named_modules() if type(layer) is nn.Linear and "blocks" in name]
    for layer in layers:
        layer.__class__ = Held
    return len(layers)


def test_fused_and_applied_agree(tmp_path: Path, loaded: Any) -> None:
    files = [
        adapter(write_lora(tmp_path / "one.safetensors", pairs_for(loaded), KOHYA, alpha=6), 0.7),
        adapter(write_lora(tmp_path / "two.safetensors", pairs_for(loaded, seed=1, rank=1)), -0.4),
    ]
    fused, applied, plain = copy.deepcopy(loaded), copy.deepcopy(loaded), forward(loaded)
    hold(applied)
    one, two = apply_loras(fused, files, CPU), apply_loras(applied, files, CPU)
    assert (one.fused, one.applied, two.fused, two.applied) == (8, 0, 4, 4)
    change = (forward(fused) - plain).norm()
    assert change > 0.1 * plain.norm()
    assert 0 < (forward(fused) - forward(applied)).norm() < 1e-5 * change
    two.remove()
    assert torch.equal(forward(applied), plain)


def test_quantised_layers_keep_their_bytes_and_get_a_branch(tmp_path: Path, loaded: Any) -> None:
    quantized, exact = copy.deepcopy(loaded), copy.deepcopy(loaded)
    quantize_model(quantized, precision("bnb-int8", "cpu"), CPU)
    plain, bytes_before = forward(quantized), weights_bytes(quantized)
    codes = {name: layer.weight.clone() for name, layer in quantized.named_modules() if hasattr(layer, "state")}
    files = [adapter(write_lora(tmp_path / "a.safetensors", pairs_for(loaded)))]
    handle = apply_loras(quantized, files, CPU)
    assert handle.ran == {"files": [{"sha256": files[0].sha256, "weight": 1.0}], "fused_layers": 4, "applied_layers": 4}
    assert weights_bytes(quantized) > bytes_before, "the branches count as held weights"
    assert all(torch.equal(quantized.get_submodule(name).weight, code) for name, code in codes.items())
    apply_loras(exact, files, CPU)
    change = (forward(exact) - forward(loaded)).norm()
    assert (forward(quantized) - forward(exact)).norm() < 0.1 * change
    handle.remove()
    assert torch.equal(forward(quantized), plain) and weights_bytes(quantized) == bytes_before


class Bytes(nn.Module):
    """A layer of int8 codes that holds buffers alone and is no nn.Linear."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("codes", (layer.weight * 100).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.codes.float() / 100).T


def test_any_module_with_the_sizes_of_a_linear_layer_takes_a_branch(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), Bytes(nn.Linear(6, 5)))
    (down, up), x = random_pairs({"1": (5, 6)})["1"], torch.ones(2, 4)
    with torch.inference_mode():
        plain, inner = model(x), model[0](x)
        path = write_lora(tmp_path / "a.safetensors", {"1": (down, up)}, alpha=6)
        with apply_loras(model, [adapter(path)], CPU) as handle:
            assert (handle.fused, handle.applied) == (0, 1)
            added = inner @ torch.from_numpy(2 * up @ down).T
            torch.testing.assert_close(model(x), plain + added)
        assert torch.equal(model(x), plain)


def test_a_branch_moves_with_its_layer_and_is_in_its_dtype(tmp_path: Path, loaded: Any) -> None:
    model = copy.deepcopy(loaded).to(torch.bfloat16)
    hold(model)
    apply_loras(model, [adapter(write_lora(tmp_path / "a.safetensors", pairs_for(loaded)))], CPU)
    layer = model.transformer_blocks[0].attn1.to_q
    assert {layer.lora_down.dtype, layer.lora_up.dtype} == {torch.bfloat16}
    assert model.to("meta").transformer_blocks[0].attn1.to_q.lora_up.is_meta
    assert not any("lora" in name for name in model.state_dict())


# off again


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepare", [lambda model: None, hold], ids=["fused", "applied"])
def test_taking_files_off_gives_back_the_very_bits(
    tmp_path: Path, transformer: Any, dtype: torch.dtype, prepare: Callable[[nn.Module], object]
) -> None:
    transformer.to(dtype)
    prepare(transformer)
    before, plain = state(transformer), forward(transformer)
    places = {name: parameter.data_ptr() for name, parameter in transformer.named_parameters()}
    with apply_loras(transformer, [adapter(write_lora(tmp_path / "a.safetensors", pairs_for(transformer)))], CPU):
        assert not torch.equal(forward(transformer), plain)
    assert same(state(transformer), before) and torch.equal(forward(transformer), plain)
    assert places == {name: parameter.data_ptr() for name, parameter in transformer.named_parameters()}
    assert not any(layer._forward_hooks for layer in transformer.modules())


def test_the_order_of_sets_changes_nothing(tmp_path: Path, loaded: Any) -> None:
    one, two = (
        LoraRef(write_lora(tmp_path / f"{seed}.safetensors", pairs_for(loaded, seed=seed)), 0.9) for seed in (0, 1)
    )
    sets = {"none": (), "one": (one,), "two": (two,), "both": (one, two)}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in sets}
    for order in (["none", "one", "two", "both"], ["both", "one", "none", "two", "one", "one", "none"]):
        model, watch = copy.deepcopy(loaded), Stopwatch(CPU)
        switch = LoraSwitch(model, CPU)
        for name in order:
            switch.use(sets[name], watch)
            found[name].append(forward(model))
        assert "lora" in watch.seconds
    for outputs in found.values():
        assert len(outputs) >= 2 and all(torch.equal(outputs[0], output) for output in outputs)
    assert len({output[0].sum().item() for output in found.values()}) == 4


def test_a_set_that_is_on_stays_untouched(tmp_path: Path, transformer: Any) -> None:
    lora = LoraRef(write_lora(tmp_path / "a.safetensors", pairs_for(transformer)))
    switch, watch = LoraSwitch(transformer, CPU), Stopwatch(CPU)
    switch.use((), watch)
    assert (switch.ran, watch.seconds) == ({}, {})
    switch.use((lora,), watch)
    assert switch.ran["loras"]["files"] == [{"sha256": adapter(Path(lora.path)).sha256, "weight": 1.0}]
    watch.seconds.clear()
    switch.use((lora,), watch)
    assert watch.seconds == {}
    switch.use((), watch)
    assert switch.ran == {} and "lora" in watch.seconds


# what goes wrong


def test_all_files_that_do_not_fit_are_named_before_anything_is_changed(tmp_path: Path, transformer: Any) -> None:
    before = state(transformer)
    wrong = {
        "absent": random_pairs({"transformer_blocks.47.attn1.to_q": (32, 32)}),
        "other": random_pairs({"transformer_blocks.0.attn1.to_q": (64, 64)}),
    }
    paths = [write_lora(tmp_path / f"{name}.safetensors", pairs) for name, pairs in wrong.items()]
    good = write_lora(tmp_path / "good.safetensors", pairs_for(transformer))
    with pytest.raises(LoraError) as caught:
        apply_loras(transformer, [adapter(path) for path in (good, *paths)], CPU)
    first, second = str(caught.value).splitlines()
    assert first.startswith(str(paths[0])) and "transformer_blocks.47.attn1.to_q; it has e.g. proj_in" in first
    assert second.startswith(str(paths[1])) and "is 64 to 64 in the file and 32 to 32 in the model" in second
    assert same(state(transformer), before)


def test_values_that_are_not_finite_are_refused(tmp_path: Path, transformer: Any) -> None:
    pairs = pairs_for(transformer)
    pairs["proj_in"][0][0, 0] = np.nan
    path = write_lora(tmp_path / "a.safetensors", pairs)
    with pytest.raises(LoraError, match=r"a\.safetensors has values that are not finite: transformer\.proj_in\.lora_A"):
        adapter(path)


def test_a_fault_half_way_leaves_the_transformer_as_it_was(tmp_path: Path, transformer: Any) -> None:
    before = state(transformer)
    found = adapter(write_lora(tmp_path / "a.safetensors", pairs_for(transformer)))
    broken = {**found.updates, LAYERS[-1]: None}
    with pytest.raises(AttributeError):
        apply_loras(transformer, [Adapter(found.file, broken, 1.0, "")], CPU)  # type: ignore[arg-type]
    assert same(state(transformer), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_files_of_other_types_are_read(tmp_path: Path, transformer: Any, dtype: torch.dtype) -> None:
    held = {
        f"{name}.lora_{half}.weight": torch.from_numpy(matrix).to(dtype)
        for name, pair in pairs_for(transformer).items()
        for half, matrix in zip("AB", pair, strict=True)
    }
    save_file(held, tmp_path / "a.safetensors")
    before = transformer.proj_in.weight.double()
    apply_loras(transformer, [adapter(tmp_path / "a.safetensors")], CPU)
    exact = before + held["proj_in.lora_B.weight"].double() @ held["proj_in.lora_A.weight"].double()
    assert torch.allclose(transformer.proj_in.weight.double(), exact, atol=1e-6)
