"""A random LTX checkpoint folder, small enough to write in a second: real classes, real layout, no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

LATENT_CHANNELS = 8
CAPTION_CHANNELS = 16

TRANSFORMER: dict[str, Any] = {
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "num_layers": 2,
    "caption_channels": CAPTION_CHANNELS,
}
# Compresses as the 0.9.5 to 0.9.8 VAE does: 32x in space, 8x in time, with a timestep for the decoder.
VAE: dict[str, Any] = {
    "latent_channels": LATENT_CHANNELS,
    "block_out_channels": (8, 8, 16, 16, 16),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "decoder_block_out_channels": (8, 16, 32),
    "layers_per_block": (1, 1, 1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1, 1),
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
UPSAMPLER: dict[str, Any] = {"in_channels": LATENT_CHANNELS, "mid_channels": 32, "num_blocks_per_stage": 1, "dims": 3}
SCHEDULER: dict[str, Any] = {"shift": 1.0, "use_dynamic_shifting": False}


def write_tiny_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    pipeline_config: str | None = None,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
) -> Path:
    """Write transformer/, vae/, text_encoder/, latent_upsampler/, tokenizer/ and scheduler/ below `folder` and return it.

    The keyword dictionaries change single configuration values; `pipeline_config` is the text of pipeline_config.yaml.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LTXVideoTransformer3DModel(**{**TRANSFORMER, **(transformer or {})}).save_pretrained(folder / "transformer")
        _vae({**VAE, **(vae or {})}).save_pretrained(folder / "vae")
        _text_encoder().save_pretrained(folder / "text_encoder")
        LTXLatentUpsamplerModel(**UPSAMPLER).save_pretrained(folder / "latent_upsampler")
    _tokenizer().save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(**{**SCHEDULER, **(scheduler or {})}).save_pretrained(folder / "scheduler")
    if pipeline_config is not None:
        (folder / "pipeline_config.yaml").write_text(pipeline_config)
    return folder


def _vae(config: dict[str, Any]) -> AutoencoderKLLTXVideo:
    vae = AutoencoderKLLTXVideo(**config)
    vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, config["latent_channels"]))
    vae.latents_std.copy_(torch.linspace(0.5, 2.0, config["latent_channels"]))
    return vae


def _text_encoder() -> T5EncoderModel:
    sizes = {"d_model": CAPTION_CHANNELS, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5EncoderModel(T5Config(vocab_size=259, feed_forward_proj="gated-gelu", **sizes))
    # transformers starts an embedding at unit variance and the rest near zero; spread both, so that prompts differ.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: pads with 0, ends with 1, and no text is unknown."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary |= {letter: 3 + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)
