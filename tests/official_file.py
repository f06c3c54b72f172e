"""Official single files made of a checkpoint folder: the same weights under the official names, with the official config.

The names are written down here the other way round than the package has them, and by tables instead of by rules:
Lightricks/LTX-Video numbers the blocks of its VAE by their place in a list, diffusers groups them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ALLOWED = [1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725, 0.4219]


@dataclass(frozen=True)
class Release:
    """What a release's VAE is: diffusers' configuration of a tiny one, the official one, and diffusers' module for each
    official block of encoder and decoder."""

    vae: dict[str, Any]
    config: dict[str, Any]
    encoder: tuple[str, ...]
    decoder: tuple[str, ...]
    scheduler: dict[str, Any]
    causal_positions: bool


def res(layers: int, **values: Any) -> list[Any]:
    return ["res_x", {"num_layers": layers, **values}]


_WIDEN = ["compress_all", {"residual": True, "multiplier": 2}]
_OLD_ENCODER = {
    "block_out_channels": (8, 16, 32, 32),
    "down_block_types": ("LTXVideoDownBlock3D",) * 4,
    "downsample_type": ("conv",) * 4,
    "spatio_temporal_scaling": (True, True, True, False),
    "layers_per_block": (1, 2, 1, 1, 2),
    "spatial_compression_ratio": None,
    "temporal_compression_ratio": None,
}
_OLD_BLOCKS = [
    ["res_x", 1],
    ["compress_all", 1],
    ["res_x_y", 1],
    ["res_x", 2],
    ["compress_all", 1],
    ["res_x_y", 1],
    ["res_x", 1],
    ["compress_all", 1],
    ["res_x", 1],
    ["res_x", 2],
]
_OLD_ENCODER_MODULES = (
    "down_blocks.0",
    "down_blocks.0.downsamplers.0",
    "down_blocks.0.conv_out",
    "down_blocks.1",
    "down_blocks.1.downsamplers.0",
    "down_blocks.1.conv_out",
    "down_blocks.2",
    "down_blocks.2.downsamplers.0",
    "down_blocks.3",
    "mid_block",
)
_NEW_DECODER_MODULES = (
    "mid_block",
    "up_blocks.0.upsamplers.0",
    "up_blocks.0",
    "up_blocks.1.upsamplers.0",
    "up_blocks.1",
    "up_blocks.2.upsamplers.0",
    "up_blocks.2",
)
_SHIFTED = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024}
RELEASES = {
    "0.9.8": Release(
        vae={
            "layers_per_block": (1, 2, 1, 1, 2),
            "decoder_layers_per_block": (1, 2, 1, 2),
            "block_out_channels": (8, 16, 32, 64, 64),
        },
        config={
            "encoder_blocks": [
                res(1),
                ["compress_space_res", {"multiplier": 2}],
                res(2),
                ["compress_time_res", {"multiplier": 2}],
                res(1),
                ["compress_all_res", {}],
                res(1),
                ["compress_all_res", {"multiplier": 1}],
                res(2),
            ],
            "decoder_blocks": [res(1), _WIDEN, res(2, inject_noise=False), _WIDEN, res(1), _WIDEN, res(2)],
            "encoder_base_channels": 8,
            "decoder_base_channels": 4,
            "timestep_conditioning": True,
        },
        encoder=(
            "down_blocks.0",
            "down_blocks.0.downsamplers.0",
            "down_blocks.1",
            "down_blocks.1.downsamplers.0",
            "down_blocks.2",
            "down_blocks.2.downsamplers.0",
            "down_blocks.3",
            "down_blocks.3.downsamplers.0",
            "mid_block",
        ),
        decoder=_NEW_DECODER_MODULES,
        scheduler={},
        causal_positions=True,
    ),
    "0.9.1": Release(
        vae={
            **_OLD_ENCODER,
            "decoder_layers_per_block": (1, 2, 1, 2),
            "decoder_inject_noise": (True, False, True, False),
        },
        config={
            "encoder_blocks": _OLD_BLOCKS,
            "decoder_blocks": [
                res(1, inject_noise=True),
                _WIDEN,
                res(2),
                _WIDEN,
                res(1, inject_noise=True),
                _WIDEN,
                res(2),
            ],
            "encoder_base_channels": 8,
            "decoder_base_channels": 4,
            "timestep_conditioning": True,
        },
        encoder=_OLD_ENCODER_MODULES,
        decoder=_NEW_DECODER_MODULES,
        scheduler={**_SHIFTED, "shift_terminal": 0.1},
        causal_positions=False,
    ),
    "0.9.0": Release(
        vae={
            **_OLD_ENCODER,
            "decoder_block_out_channels": (8, 16, 32, 32),
            "decoder_layers_per_block": (1, 2, 1, 1, 2),
            "decoder_spatio_temporal_scaling": (True, True, True, False),
            "decoder_inject_noise": (False,) * 5,
            "upsample_residual": (False,) * 4,
            "upsample_factor": (1,) * 4,
            "timestep_conditioning": False,
        },
        config={"blocks": _OLD_BLOCKS, "encoder_base_channels": 8, "decoder_base_channels": 8},
        encoder=_OLD_ENCODER_MODULES,
        decoder=(
            "mid_block",
            "up_blocks.0",
            "up_blocks.1.upsamplers.0",
            "up_blocks.1",
            "up_blocks.2.conv_in",
            "up_blocks.2.upsamplers.0",
            "up_blocks.2",
            "up_blocks.3.conv_in",
            "up_blocks.3.upsamplers.0",
            "up_blocks.3",
        ),
        scheduler={**_SHIFTED, "shift_terminal": 0.1},
        causal_positions=False,
    ),
}

# What tests.tiny_checkpoint writes when it is told nothing.
PLAIN = replace(
    RELEASES["0.9.8"],
    vae={},
    config={
        **RELEASES["0.9.8"].config,
        "encoder_blocks": [
            res(1),
            ["compress_space_res", {"multiplier": 1}],
            res(1),
            ["compress_time_res", {"multiplier": 2}],
            res(1),
            ["compress_all_res", {"multiplier": 1}],
            res(1),
            ["compress_all_res", {"multiplier": 1}],
            res(1),
        ],
        "decoder_blocks": [res(1), _WIDEN, res(1), _WIDEN, res(1), _WIDEN, res(1)],
    },
)


def write_official_file(
    folder: Path,
    target: Path,
    release: str | Release = "0.9.8",
    *,
    dtype: torch.dtype | None = None,
    with_config: bool = True,
    changes: dict[str, Any] | None = None,
) -> Path:
    """The transformer and VAE below `folder` as one file. `dtype` is of the transformer's linear weights; `changes` are
    values of the config by their dotted names."""
    transformer = {
        f"model.diffusion_model.{_transformer_name(name)}": tensor.to(dtype) if dtype and tensor.ndim == 2 else tensor
        for name, tensor in load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors").items()
    }
    tensors = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    found = RELEASES[release] if isinstance(release, str) else release
    names = {name: _vae_name(name, found) for name in tensors}
    vae = {f"vae.{names[name]}": tensor for name, tensor in tensors.items() if names[name]}
    vae["vae.per_channel_statistics.channel"] = torch.arange(float(len(tensors["latents_mean"])))
    vae["vae.per_channel_statistics.mean-of-stds"] = torch.ones(len(tensors["latents_mean"]))
    config = official_config(folder, found)
    for name, value in (changes or {}).items():
        section, _, key = name.rpartition(".")
        (config[section] if section else config)[key] = value
    save_file({**transformer, **vae}, target, metadata={"config": json.dumps(config)} if with_config else None)
    return target


def write_official_upsampler(folder: Path, target: Path, *, with_config: bool = True) -> Path:
    config = json.loads((folder / "latent_upsampler" / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("_")} | {
        "_class_name": "LatentUpsampler"
    }
    tensors = load_file(folder / "latent_upsampler" / "diffusion_pytorch_model.safetensors")
    save_file(tensors, target, metadata={"config": json.dumps(config)} if with_config else None)
    return target


def official_config(folder: Path, found: Release) -> dict[str, Any]:
    """What the official metadata says of the folder's models."""
    sizes = json.loads((folder / "transformer" / "config.json").read_text())
    kept = ("num_attention_heads", "attention_head_dim", "cross_attention_dim", "num_layers", "caption_channels")
    latent_channels = sizes["in_channels"]
    transformer = {
        "_class_name": "Transformer3DModel",
        **{name: sizes[name] for name in kept},
        "in_channels": latent_channels,
        "out_channels": latent_channels,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_type": "default",
        "double_self_attention": False,
        "dropout": 0.0,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "num_embeds_ada_norm": 1000,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "project_to_2d_pos": True,
        "qk_norm": "rms_norm",
        "standardization_norm": "rms_norm",
        "upcast_attention": False,
        "use_linear_projection": False,
        "positional_embedding_type": "rope",
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "timestep_scale_multiplier": 1000,
        **({"causal_temporal_positioning": True} if found.causal_positions else {}),
    }
    vae = {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": latent_channels,
        "scaling_factor": 1.0,
        "norm_layer": "pixel_norm",
        "patch_size": 4,
        "latent_log_var": "uniform",
        "use_quant_conv": False,
        "causal_decoder": False,
        **found.config,
    }
    scheduler = {"_class_name": "RectifiedFlowScheduler", "num_train_timesteps": 1000, "base_resolution": None}
    if found.scheduler:
        scheduler |= {"shifting": "SD3", "target_shift_terminal": 0.1}
    else:
        scheduler |= {"shifting": None, "sampler": "LinearQuadratic"}
    return {"transformer": transformer, "vae": vae, "scheduler": scheduler}


def _transformer_name(name: str) -> str:
    for ours, official in (
        ("proj_in", "patchify_proj"),
        ("time_embed", "adaln_single"),
        ("norm_q", "q_norm"),
        ("norm_k", "k_norm"),
    ):
        name = name.replace(ours, official)
    return name


def _vae_name(name: str, release: Release) -> str | None:
    """None for what diffusers builds and the official model has not: timesteps of a group without layers."""
    if name in ("latents_mean", "latents_std"):
        return "per_channel_statistics." + {"latents_mean": "mean-of-means", "latents_std": "std-of-means"}[name]
    side, _, rest = name.partition(".")
    modules, official = (release.encoder, "down_blocks") if side == "encoder" else (release.decoder, "up_blocks")
    # The longest name first: up_blocks.0.upsamplers.0 lies within up_blocks.0.
    for place, module in sorted(enumerate(modules), key=lambda item: -len(item[1])):
        if rest.startswith(f"{module}."):
            rest = f"{official}.{place}{rest[len(module) :]}"
            break
    else:
        if rest.startswith(official):
            return None
        rest = rest.replace("time_embedder", "last_time_embedder").replace(
            "scale_shift_table", "last_scale_shift_table"
        )
    for ours, theirs in (
        (".resnets.", ".res_blocks."),
        (".conv_shortcut.conv.", ".conv_shortcut."),
        (".norm3.", ".norm3.norm."),
    ):
        rest = rest.replace(ours, theirs)
    return f"{side}.{rest}"
