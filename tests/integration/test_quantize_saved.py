"""Quantised transformers to files and back, bitsandbytes' files, and what is refused of both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB8BitDiffusersQuantizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.errors import CheckpointError, PrecisionError
from ltx_batch.model.checkpoint import load_checkpoint
from ltx_batch.model.layers import transformer_layers, transformer_stored
from ltx_batch.model.quantize.apply import apply_policy
from ltx_batch.model.quantize.policy import precision
from ltx_batch.model.quantize.saved import WEIGHTS, save_model
from ltx_batch.model.quantize.swap import is_quantized, quantize_model
from tests.tiny_checkpoint import write_tiny_checkpoint

CPU = torch.device("cpu")
KINDS = ("int8", "int8-weight", "fp8", "bnb-int8")
WIDE = {"num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128, "num_layers": 3}
REQUEST = RenderRequest(prompt="a red circle", height=64, width=64, num_frames=9, timesteps=(1.0, 0.6))
SOURCE = {"transformer/weights.safetensors": "ab" * 32}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), transformer=WIDE)


def quantised(tiny: Path, name: str, dtype: torch.dtype = torch.float32, **bent: Any) -> Any:
    model = load_checkpoint(tiny, dtype).transformer
    quantize_model(model, precision(name, "cpu", **bent), CPU)
    return model


def saved(tiny: Path, place: Path, name: str, **bent: Any) -> Path:
    """A copy of the checkpoint whose transformer is quantised."""
    shutil.copytree(tiny, place, ignore=shutil.ignore_patterns("transformer"))
    model = quantised(tiny, name, **bent)
    save_model(model, model.config, precision(name, "cpu", **bent), place / "transformer", SOURCE)
    return place


@torch.inference_mode()
def call(model: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 12, 8, generator=draw).to(model.dtype)
    embeds = torch.randn(2, 5, 16, generator=draw).to(model.dtype)
    return model(hidden, embeds, torch.full((2, 1), 700.0), torch.ones(2, 5), 1, 3, 4, return_dict=False)[0]


@pytest.mark.parametrize("name", KINDS)
def test_what_comes_back_computes_the_same_bits(tmp_path: Path, tiny: Path, name: str) -> None:
    before = quantised(tiny, name)
    place = saved(tiny, tmp_path / "q", name)
    loaded = load_checkpoint(place, torch.float32)
    apply_policy(loaded.transformer, loaded.vae, precision(name, "cpu"), CPU, stored=loaded.stored)
    apply_policy(before, load_checkpoint(tiny, torch.float32).vae, precision(name, "cpu"), CPU, stored=loaded.stored)
    layers = [name for name, layer in before.named_modules() if is_quantized(layer)]
    assert layers == [name for name, layer in loaded.transformer.named_modules() if is_quantized(layer)]
    assert len(layers) == 3 * 8
    assert torch.equal(call(loaded.transformer), call(before))


@pytest.mark.parametrize("name", ["int8", "int8-weight", "fp8"])
def test_in_16_bits_too(tmp_path: Path, tiny: Path, name: str) -> None:
    before = quantised(tiny, name, torch.bfloat16)
    policy = precision(name, "cuda")
    save_model(before, before.config, policy, tmp_path / "transformer", SOURCE)
    for part in ("vae", "scheduler"):
        shutil.copytree(tiny / part, tmp_path / part)
    loaded = load_checkpoint(tmp_path, torch.bfloat16, with_text=False).transformer
    for (one, tensor), (two, other) in zip(before.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert one == two and tensor.dtype == other.dtype and torch.equal(tensor, other)
    assert torch.equal(call(loaded), call(before))


@pytest.mark.parametrize("name", KINDS)
def test_renders_are_the_same_from_either_folder(tmp_path: Path, tiny: Path, name: str) -> None:
    place = saved(tiny, tmp_path / "q", name)
    expected = load_renderer(str(tiny), device="cpu", precision=name).render([REQUEST])[0]
    for asked in ("auto", name):
        renderer = load_renderer(str(place), device="cpu", precision=asked)
        clip = renderer.render([REQUEST])[0]
        assert renderer.precision == clip.ran["precision"] == name
        assert clip.ran["prequantized"] and clip.ran["quantized_layers"] == 24
        assert clip.frames_sha256() == expected.frames_sha256()


def test_files_are_small_and_say_what_they_are(tmp_path: Path, tiny: Path) -> None:
    place = saved(tiny, tmp_path / "q", "int8", hadamard_group=0, skip=("ff.net.2",), keep_blocks=1)
    file = place / "transformer" / WEIGHTS
    tensors = load_file(file)
    quantised_bytes = sum(t.numel() for name, t in tensors.items() if t.dtype == torch.int8)
    weights = [name for name, tensor in tensors.items() if tensor.dtype == torch.int8]
    assert len(weights) == 7 and all("transformer_blocks.1." in name for name in weights)
    assert file.stat().st_size < 4 * sum(t.numel() for t in tensors.values()) - 3 * quantised_bytes + 30_000
    with safe_open(file, "pt") as opened:
        told = json.loads(opened.metadata()["ltx_batch_quantized"])
    assert told == {
        "format": 1,
        "precision": "int8",
        "hadamard_group": 0,
        "skip_modules": ["ff.net.2"],
        "keep_blocks": 1,
        "source": SOURCE,
    }
    stored = transformer_stored(str(place))
    assert stored is not None and (stored.name, stored.source, stored.keep_blocks) == ("int8", SOURCE, 1)
    assert transformer_layers(str(place)) == transformer_layers(str(tiny))
    assert transformer_stored(str(tiny)) is None


# other programs' files, and mistakes


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers refuses to load bitsandbytes' layers where there is no GPU, though they work on a CPU."""
    monkeypatch.setattr(BnB8BitDiffusersQuantizer, "validate_environment", lambda *args, **options: None)


def loaded_by_diffusers(place: Path) -> Any:
    return LTXVideoTransformer3DModel.from_pretrained(
        place / "transformer", torch_dtype=torch.float32, device_map={"": "cpu"}
    ).eval()


@pytest.mark.usefixtures("without_a_gpu")
@pytest.mark.parametrize("bent", [{}, {"keep_blocks": 1, "skip": ("ff.net.2",)}, {"threshold": 6.0}])
def test_diffusers_reads_what_is_written_for_bitsandbytes(tmp_path: Path, tiny: Path, bent: dict[str, Any]) -> None:
    ours = quantised(tiny, "bnb-int8", **bent)
    theirs = loaded_by_diffusers(saved(tiny, tmp_path / "q", "bnb-int8", **bent))
    kinds = [{name: type(layer) for name, layer in model.named_modules()} for model in (ours, theirs)]
    assert kinds[0] == kinds[1]
    assert torch.equal(call(theirs), call(ours))


@pytest.mark.usefixtures("without_a_gpu")
def test_what_diffusers_writes_for_bitsandbytes_is_read(tmp_path: Path, tiny: Path) -> None:
    theirs = loaded_by_diffusers(saved(tiny, tmp_path / "q", "bnb-int8", skip=("attn2",)))
    again = tmp_path / "again"
    shutil.copytree(tiny, again, ignore=shutil.ignore_patterns("transformer"))
    theirs.save_pretrained(again / "transformer")
    loaded = load_checkpoint(again, torch.float32)
    assert loaded.stored is not None and loaded.stored.name == "bnb-int8"
    apply_policy(loaded.transformer, loaded.vae, precision("bnb-int8", "cpu"), CPU, stored=loaded.stored)
    assert sum(map(is_quantized, loaded.transformer.modules())) == 3 * 6
    assert torch.equal(call(loaded.transformer), call(theirs))


def test_checkpoints_of_bitsandbytes_are_read(tmp_path: Path, tiny: Path) -> None:
    """As diffusers writes one: layers outside the blocks too, no word in the metadata, a quantization_config."""
    place = saved(tiny, tmp_path / "q", "bnb-int8", keep_blocks=0)
    file = place / "transformer" / WEIGHTS
    tensors = load_file(file)
    for name in ("proj_out", "transformer_blocks.0.attn2.to_k"):
        weight = tensors[f"{name}.weight"]
        largest = weight.abs().amax(1)
        tensors[f"{name}.weight"] = torch.round(weight * 127 / largest[:, None]).to(torch.int8)
        tensors |= {f"{name}.SCB": largest, f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((place / "transformer" / "config.json").read_text())
    config["quantization_config"] = {"load_in_8bit": True, "quant_method": "bitsandbytes"}
    (place / "transformer" / "config.json").write_text(json.dumps(config))
    renderer = load_renderer(str(place), device="cpu", llm_int8_threshold=6.0)
    clip = renderer.render([REQUEST])[0]
    assert (renderer.precision, clip.ran["quantized_layers"], clip.ran["llm_int8_threshold"]) == ("bnb-int8", 26, 6.0)
    expected = load_renderer(str(tiny), device="cpu", precision="fp32").render([REQUEST])[0]
    error = abs(clip.frames.astype(float) - expected.frames).mean() / expected.frames.std()
    assert 0 < error < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, r"cannot be used with precision 'bf16' \(it has 'int8'\): leave that out"),
        ({"precision": "fp8"}, "precision 'fp8'"),
        ({"hadamard_group": 256}, r"hadamard_group 256 \(it has 64\)"),
        ({"skip_modules": ["ff.net.2"]}, "skip_modules"),
        ({"keep_blocks": 1}, "keep_blocks 1"),
    ],
)
def test_weights_are_not_rounded_twice(tmp_path: Path, tiny: Path, options: dict[str, Any], message: str) -> None:
    place = saved(tiny, tmp_path / "q", "int8")
    with pytest.raises(PrecisionError, match=message):
        load_renderer(str(place), device="cpu", **options)


def break_metadata(file: Path, text: str) -> None:
    save_file(load_file(file), file, {"ltx_batch_quantized": text})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "cannot be read: 'format'"),
        ("no json", "cannot be read"),
        ('{"format": 2}', "was quantised in format 2, and this version reads 1: quantise it again"),
        (
            '{"format": 1, "precision": "int7", "hadamard_group": 0, "skip_modules": [], "keep_blocks": null, "source": {}}',
            "unknown precision 'int7'|is quantised as int7, which this version does not know",
        ),
    ],
)
def test_what_cannot_be_read_says_so(tmp_path: Path, tiny: Path, text: str, message: str) -> None:
    place = saved(tiny, tmp_path / "q", "int8")
    break_metadata(place / "transformer" / WEIGHTS, text)
    with pytest.raises((CheckpointError, PrecisionError), match=message):
        load_renderer(str(place), device="cpu")


def test_int8_of_other_programs_is_refused(tmp_path: Path, tiny: Path) -> None:
    place = saved(tiny, tmp_path / "q", "int8")
    file = place / "transformer" / WEIGHTS
    save_file(load_file(file), file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="is I8, which is a quantised file of another program"):
        load_renderer(str(place), device="cpu")


def test_layers_that_the_model_has_not_are_named(tmp_path: Path, tiny: Path) -> None:
    place = saved(tiny, tmp_path / "q", "int8")
    file = place / "transformer" / WEIGHTS
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({**load_file(file), "transformer_blocks.7.ff.net.2.weight_scale": torch.ones(4)}, file, metadata)
    with pytest.raises(
        CheckpointError, match=r"has a quantised transformer_blocks.7.ff.net.2, and the model no linear"
    ):
        load_renderer(str(place), device="cpu")
