"""Models of the real sizes with random weights, made where they will work: nothing is read, and the host holds no copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ltx_batch.model.checkpoint import Checkpoint
from ltx_batch.model.part import Part
from ltx_batch.model.quantize.by_block import quantize_by_block
from ltx_batch.model.quantize.policy import Precision
from ltx_batch.model.sigmas import SchedulerConfig
from ltx_batch.model.sizes import text_sizes
from ltx_batch.model.text_precision import BLOCKS, text_policy
from ltx_batch.tensor_file import StoredTensor

_STD = 0.02  # small enough that nothing overflows, large enough that nothing is zero

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "2b": {"num_attention_heads": 32, "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28},
    "13b": {"num_attention_heads": 32, "attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
}
# Releases 0.9.5 to 0.9.8.
VAE: dict[str, Any] = {
    "latent_channels": 128,
    "block_out_channels": (128, 256, 512, 1024, 2048),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "decoder_block_out_channels": (256, 512, 1024),
    "layers_per_block": (4, 6, 6, 2, 2),
    "decoder_layers_per_block": (5, 5, 5, 5),
    "spatio_temporal_scaling": (True,) * 4,
    "decoder_spatio_temporal_scaling": (True,) * 3,
    "decoder_inject_noise": (False,) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "upsample_residual": (True,) * 3,
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
UPSAMPLER: dict[str, Any] = {"in_channels": 128, "mid_channels": 512, "num_blocks_per_stage": 4, "dims": 3}
T5_XXL: dict[str, Any] = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_TINY: dict[str, dict[str, Any]] = {
    "transformer": {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 4,
        "caption_channels": 16,
    },
    "vae": {
        "latent_channels": 8,
        "block_out_channels": (8, 8, 16, 16, 16),
        "decoder_block_out_channels": (8, 16, 32),
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 4,
    },
    "upsampler": {"in_channels": 8, "mid_channels": 32, "num_blocks_per_stage": 1},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
}


@dataclass(frozen=True, slots=True)
class RandomText:
    """A text encoder that is made when it is asked for: as `TextParts`, with numbers that are drawn and not read. `device`
    is where it is quantised."""

    config: T5Config
    policy: Precision
    tokenizer: Any
    device: torch.device

    @property
    def precision(self) -> str:
        return self.policy.name

    @property
    def weights_bytes(self) -> int:
        tensors = {
            name: StoredTensor("", "BF16", tuple(one.shape), 0) for name, one in self._built().state_dict().items()
        }
        return text_sizes(Part("random", self.config.to_dict(), tensors), self.policy).whole_bytes

    def load(self, home: torch.device) -> Any:
        model = self._built()
        if self.policy.quantize is None:
            return drawn(model, home)

        def fill(name: str) -> None:
            if name:
                drawn(model.get_submodule(name), self.device)
            else:
                for part in (model.shared, model.encoder.final_layer_norm):
                    drawn(part, home)

        quantize_by_block(model, self.policy, self.device, blocks=BLOCKS, home=home, fill=fill)
        return model.eval().requires_grad_(False)

    def _built(self) -> Any:
        model = on_meta(lambda: T5EncoderModel(self.config), getattr(torch, self.policy.dtype))
        model.set_input_embeddings(model.shared)  # one matrix, as in the real one
        return model


def random_parts(name: str, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> Checkpoint:
    """`2b`, `13b`, or `tiny`, which has all the parts and none of their size."""
    torch.manual_seed(seed)
    tiny: dict[str, dict[str, Any]] = _TINY if name == "tiny" else {}
    transformer = {"caption_channels": 4096, **TRANSFORMERS.get(name, {}), **tiny.get("transformer", {})}
    return Checkpoint(
        transformer=make(lambda: LTXVideoTransformer3DModel(**transformer), dtype, device),
        vae=make(lambda: AutoencoderKLLTXVideo(**{**VAE, **tiny.get("vae", {})}), dtype, device),
        text=random_text(name, dtype, device),
        scheduler=SchedulerConfig(),
        latent_upsampler=make(
            lambda: LTXLatentUpsamplerModel(**{**UPSAMPLER, **tiny.get("upsampler", {})}), dtype, device
        ),
    )


def random_text(name: str, dtype: torch.dtype, device: torch.device, *, precision: str = "auto") -> RandomText:
    """T5-XXL, or for `tiny` one without its size; `precision` is as of `text_policy`."""
    sizes = T5_XXL | (_TINY["t5"] if name == "tiny" else {})
    policy = text_policy(precision, "float32" if dtype == torch.float32 else "bfloat16", device.type)
    config = T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes)
    return RandomText(config, policy, byte_tokenizer(), device)


def make(build: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Built without memory, then filled on the device."""
    return drawn(on_meta(build, dtype), device)


def on_meta(build: Any, dtype: torch.dtype) -> Any:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return build()
    finally:
        torch.set_default_dtype(usual)


@torch.no_grad()
def drawn(model: nn.Module, device: torch.device) -> Any:
    """Matrices and kernels drawn, scales one, biases zero, on the device."""
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=_STD)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for name, buffer in model.named_buffers():
        buffer.fill_(1.0 if name.endswith(("std", "multiplier")) else 0.0)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, which any text encoder's vocabulary has room for."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary |= {letter: 3 + index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
