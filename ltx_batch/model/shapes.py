"""What shapes alone say of a model: official configs for files whose metadata has none (0.9.0 and repacked ones). No torch.

The answers have the form of the official `config` (Lightricks/LTX-Video, utils/diffusers_config_mapping.py), so that a
file with a config and one without go the same way from here on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

_HEADS = 32  # of every release; weights do not tell


def transformer_sizes(shapes: Shapes) -> dict[str, int]:
    """Sizes that the weights state, by the official names of modules. Raises KeyError for what is no transformer."""
    return {
        "num_layers": _count(shapes, "transformer_blocks"),
        "width": shapes["patchify_proj.weight"][0],
        "in_channels": shapes["patchify_proj.weight"][1],
        "out_channels": shapes["proj_out.weight"][0],
        "caption_channels": shapes["caption_projection.linear_1.weight"][1],
        "cross_attention_dim": shapes["transformer_blocks.0.attn2.to_k.weight"][1],
    }


def guess_transformer(shapes: Shapes, *, causal_positions: bool) -> dict[str, Any]:
    """The official config of a transformer with 32 heads. Raises ValueError where the width does not divide so."""
    sizes = transformer_sizes(shapes)
    width = sizes.pop("width")
    if width % _HEADS:
        raise ValueError(
            f"the metadata has no config, and a width of {width} is not {_HEADS} heads as in every release; "
            "write the transformer's config into the file's metadata"
        )
    return {
        **sizes,
        "num_attention_heads": _HEADS,
        "attention_head_dim": width // _HEADS,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "qk_norm": "rms_norm",
        "standardization_norm": "rms_norm",
        "positional_embedding_type": "rope",
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "timestep_scale_multiplier": 1000,
        "causal_temporal_positioning": causal_positions,
    }


def guess_vae(shapes: Shapes) -> dict[str, Any]:
    """The official config of a VAE with these tensors. Raises KeyError or ValueError for what is none."""
    latent_channels = shapes["decoder.conv_in.conv.weight"][1]
    return {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": latent_channels,
        "encoder_blocks": _encoder_blocks(shapes),
        "decoder_blocks": _decoder_blocks(shapes),
        "encoder_base_channels": shapes["encoder.conv_in.conv.weight"][0],
        "decoder_base_channels": shapes["decoder.conv_out.conv.weight"][1],
        "norm_layer": "pixel_norm",
        "patch_size": math.isqrt(shapes["encoder.conv_in.conv.weight"][1] // 3),
        "latent_log_var": "uniform",
        "use_quant_conv": False,
        "causal_decoder": False,
        "timestep_conditioning": "decoder.last_scale_shift_table" in shapes,
    }


def is_modern_vae(vae_config: Mapping[str, Any]) -> bool:
    """Whether the VAE is of 0.9.5 or later: those shrink by folding pixels into channels, the earlier by strides."""
    return any(str(name).endswith("_res") for name, _ in vae_config.get("encoder_blocks") or ())


def guess_upsampler(shapes: Shapes) -> dict[str, Any]:
    """The official config of a latent upsampler. Raises KeyError for what is none."""
    mid_channels, in_channels, *kernel = shapes["initial_conv.weight"]
    rows, _, *up_kernel = shapes["upsampler.0.weight"]
    return {
        "in_channels": in_channels,
        "mid_channels": mid_channels,
        "num_blocks_per_stage": _count(shapes, "res_blocks"),
        "dims": len(kernel),
        "spatial_upsample": rows != 2 * mid_channels,
        "temporal_upsample": len(up_kernel) == 3,
    }


def _encoder_blocks(shapes: Shapes) -> list[list[Any]]:
    """Each entry with the width that goes into the next one, which tells how much a folding layer folds."""
    places = [f"encoder.down_blocks.{place}" for place in range(_count(shapes, "encoder.down_blocks"))]
    widths = [*(_width_into(shapes, path) for path in places), shapes["encoder.conv_out.conv.weight"][1]]
    strides = {4: "compress_space_res", 2: "compress_time_res", 8: "compress_all_res"}
    blocks = []
    for path, width, after in zip(places, widths, widths[1:], strict=False):
        if f"{path}.conv.conv.weight" in shapes:
            folded = after // shapes[f"{path}.conv.conv.weight"][0]
            if folded not in strides:
                raise ValueError(f"{path} folds {folded} pixels into one, which no release does")
            blocks.append([strides[folded], {"multiplier": after // width}])
        elif f"{path}.conv.weight" in shapes:
            blocks.append(["compress_all", {}])
        else:
            blocks.append(_layers(shapes, path, after / width))
    return blocks


def _decoder_blocks(shapes: Shapes) -> list[list[Any]]:
    """In the order of the config, which is from the picture inwards."""
    blocks = []
    for place in range(_count(shapes, "decoder.up_blocks")):
        path = f"decoder.up_blocks.{place}"
        if f"{path}.conv.conv.weight" in shapes:
            rows, width = shapes[f"{path}.conv.conv.weight"][:2]
            multiplier = 8 * width // rows
            blocks.append(["compress_all", {"multiplier": multiplier, "residual": multiplier > 1}])
        else:
            blocks.append(_layers(shapes, path, _narrowing(shapes, path)))
    return blocks[::-1]


def _layers(shapes: Shapes, path: str, multiplier: float) -> list[Any]:
    noisy = any(name.startswith(path) and name.endswith("per_channel_scale1") for name in shapes)
    if f"{path}.conv1.conv.weight" in shapes:
        return ["res_x_y", {"multiplier": int(multiplier), "inject_noise": noisy}]
    return ["res_x", {"num_layers": _count(shapes, f"{path}.res_blocks"), "inject_noise": noisy}]


def _narrowing(shapes: Shapes, path: str) -> float:
    narrow, wide = shapes.get(f"{path}.conv1.conv.weight", (1, 1))[:2]
    return wide / narrow


def _width_into(shapes: Shapes, path: str) -> int:
    names = ("res_blocks.0.conv1.conv.weight", "conv1.conv.weight", "conv.conv.weight", "conv.weight")
    found: Sequence[int] = next(shapes[f"{path}.{name}"] for name in names if f"{path}.{name}" in shapes)
    return found[1]


def _count(shapes: Shapes, path: str) -> int:
    """How many modules are in the list at `path`."""
    start = f"{path}."
    return 1 + max((int(name[len(start) :].partition(".")[0]) for name in shapes if name.startswith(start)), default=-1)
