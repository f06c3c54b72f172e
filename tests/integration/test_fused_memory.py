"""What a call of fused int8 blocks holds at once, counted on the meta device: memory.py's numbers for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from torch import nn

from ltx_batch.model.chunks import in_chunks
from ltx_batch.model.lora import LoraHandle, Update
from ltx_batch.model.memory import CHUNK_TOKENS, ModelSizes, Work, denoise_bytes
from ltx_batch.model.plan import Guidance, PassPlan, Plan, Target
from ltx_batch.model.quantize import block, linear
from ltx_batch.model.quantize.block import fuse_blocks
from ltx_batch.model.quantize.linear import Int8Linear
from tests.live_bytes import Live

TOKENS, CHANNELS = 65_536, 4096


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def rounded(x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return empty(*x.shape, dtype=torch.int8), empty(len(x), dtype=torch.float32)


def product(rows: torch.Tensor, scales: Any, weights: Any, *_: Any) -> torch.Tensor:
    return empty(len(rows), sum(len(weight) for weight in weights))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' results without what plain torch holds on its way there."""
    alike = {"modulate_rows": lambda x, *_: empty(*x.shape), "attend_text": lambda x, *_: empty(*x.shape)}
    pair = {"norm_rotate": lambda query, key, *_: (empty(*query.shape), empty(*key.shape))}
    attention = {"_attend": lambda _, query, key, value: empty(query.shape[0] * query.shape[1], query.shape[2])}
    products = {"int8_product": product, "quantize_modulated": rounded}
    for name, kernel in {**alike, **pair, **attention, **products}.items():
        monkeypatch.setattr(block, name, kernel)
    monkeypatch.setattr(linear, "quantize_rows", rounded)
    monkeypatch.setattr(linear, "int8_product", product)


def transformer(kept: int) -> Any:
    with torch.device("meta"):
        made = LTXVideoTransformer3DModel(
            num_attention_heads=32, attention_head_dim=128, cross_attention_dim=CHANNELS, num_layers=3
        ).to(torch.bfloat16)
    for inner in made.transformer_blocks[kept:]:
        for name, layer in list(inner.named_modules()):
            if isinstance(layer, nn.Linear) and not name.startswith(("attn2.to_k", "attn2.to_v")):
                owner, _, leaf = name.rpartition(".")
                size = layer.in_features, layer.out_features
                quantised = Int8Linear(*size, bias=True, dtype=torch.bfloat16, hadamard_group=64)
                setattr(inner.get_submodule(owner), leaf, quantised)
    assert fuse_blocks(made)
    return made


def with_loras(model: Any) -> None:
    """A branch beside each quantised layer, as a LoRA file of rank 16 makes it."""
    for layer in model.modules():
        if isinstance(layer, Int8Linear):
            down, up = empty(16, layer.in_features), empty(layer.out_features, 16)
            LoraHandle([]).attach(layer, [Update(down, up, 1.0)], torch.device("meta"), torch.bfloat16)


@pytest.mark.parametrize("kept", [0, 1])
@pytest.mark.parametrize("loras", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, CHUNK_TOKENS])
def test_what_is_predicted_is_what_is_held(kernels: None, kept: int, loras: bool, chunk_tokens: int | None) -> None:
    model = transformer(kept)
    if loras:
        with_loras(model)
    inputs = {
        "hidden_states": empty(1, TOKENS, 128),
        "encoder_hidden_states": empty(1, 64, 4096),
        "encoder_attention_mask": empty(1, 64),
        "timestep": empty(1, 1, dtype=torch.float32),
        "video_coords": empty(1, 3, TOKENS, dtype=torch.float32),
    }
    with torch.inference_mode(), Live() as live, in_chunks(model, chunk_tokens):
        model(**inputs, return_dict=False)
    sizes = ModelSizes((1,), 0, 0, 0, 0, channels=CHANNELS, number_bytes=2, precision="int8")
    one = PassPlan("pass1", 32, 32 * TOKENS, 1, (1.0,), (Guidance(),))
    work = Work(Plan((one,), Target(32, 32 * TOKENS, 1), 30.0, 0.0, 0.05, 0.025), loras=loras)
    predicted = denoise_bytes(sizes, one, work, chunked=chunk_tokens is not None)
    assert live.peak <= predicted <= 1.04 * live.peak
