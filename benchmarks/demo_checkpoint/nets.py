"""The networks of the demo checkpoint: the real classes at a small size, 13.9 M parameters in all."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from torch import nn
from transformers import T5Config, T5EncoderModel

LATENT_CHANNELS = 64
VOCABULARY = 1536
# Of the official distilled models (Lightricks/LTX-2, utils/constants.py): half of what training sees.
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875)
# The schedule that ships. The official one spends five of its eight calls above 0.97 and leaves two for where a small model
# settles the place of a shape, which then tears. This one is uniform, shifted by 3 (Esser et al. 2024, arXiv 2403.03206,
# equation 23).
SIGMAS = tuple(round(3 * u / (1 + 2 * u), 4) for u in (step / 8 for step in range(8, 0, -1)))
GUIDANCE_SCALE = 1.5  # without any, small shapes fade in narrow frames; with more, squares bulge


def make_vae() -> AutoencoderKLLTXVideo:
    """The autoencoder of 0.9.5 to 0.9.8: 32x spatial, 8x temporal, decoder conditioned on a timestep."""
    return AutoencoderKLLTXVideo(
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(16, 32, 64, 128, 128),
        down_block_types=("LTXVideo095DownBlock3D",) * 4,
        decoder_block_out_channels=(32, 64, 128),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 2, 2, 1),
        spatio_temporal_scaling=(True,) * 4,
        decoder_spatio_temporal_scaling=(True,) * 3,
        decoder_inject_noise=(False,) * 4,
        downsample_type=("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        upsample_residual=(True,) * 3,
        upsample_factor=(2,) * 3,
        timestep_conditioning=True,
        patch_size=4,
        patch_size_t=1,
        resnet_norm_eps=1e-6,
        scaling_factor=1.0,
        encoder_causal=True,
        decoder_causal=False,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )


def make_text_encoder() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=128,
            d_kv=32,
            d_ff=128,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=False,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def make_transformer() -> LTXVideoTransformer3DModel:
    return LTXVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_attention_heads=8,
        attention_head_dim=32,
        cross_attention_dim=256,
        num_layers=5,
        caption_channels=128,
        qk_norm="rms_norm_across_heads",
        attention_bias=True,
        attention_out_bias=True,
    )


def make_upsampler() -> LTXLatentUpsamplerModel:
    return LTXLatentUpsamplerModel(in_channels=LATENT_CHANNELS, mid_channels=64, num_blocks_per_stage=1, dims=2)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def normalize(latents: torch.Tensor, vae: AutoencoderKLLTXVideo) -> torch.Tensor:
    """[B, C, F, H, W], channel by channel to mean 0 and deviation 1."""
    mean, deviation = (t.view(1, -1, 1, 1, 1).to(latents) for t in (vae.latents_mean, vae.latents_std))
    return (latents - mean) / deviation


def unnormalize(latents: torch.Tensor, vae: AutoencoderKLLTXVideo) -> torch.Tensor:
    mean, deviation = (t.view(1, -1, 1, 1, 1).to(latents) for t in (vae.latents_mean, vae.latents_std))
    return latents * deviation + mean
