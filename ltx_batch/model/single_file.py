"""The official single .safetensors files, in the words of diffusers: checkpoint and spatial upscaler. No torch.

A checkpoint holds the transformer under `model.diffusion_model.` and the VAE under `vae.`, and a JSON `config` in its
metadata with `transformer`, `vae`, `scheduler` and, for distilled models, `allowed_inference_steps` (Lightricks/LTX-Video,
ltx_video/inference.py, create_ltx_video_pipeline). What the config leaves out is read from shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ltx_batch.errors import CheckpointError
from ltx_batch.lora.names import diffusers_name
from ltx_batch.model.file_kind import CHECKPOINT, UPSAMPLER, check_kind
from ltx_batch.model.part import Part, Parts
from ltx_batch.model.shapes import guess_transformer, guess_upsampler, guess_vae, is_modern_vae, transformer_sizes
from ltx_batch.model.sigmas import SchedulerConfig
from ltx_batch.model.vae_blocks import group_decoder, group_encoder
from ltx_batch.tensor_file import StoredTensor, TensorFile

_TRANSFORMER, _VAE, _STATISTICS = "model.diffusion_model.", "vae.", "per_channel_statistics."
_SCALES = (".scale", "_scale", ".scales", ".scale_weight", ".scale_input", "_scale_inv", "scaled_fp8")

# What the official classes do without these keys (Transformer3DModel.__init__, CausalVideoAutoencoder.from_config).
_TRANSFORMER_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "num_layers": 1,
    "attention_bias": False,
    "norm_elementwise_affine": True,
    "norm_eps": 1e-5,
    "activation_fn": "geglu",
    "qk_norm": None,
    "standardization_norm": "layer_norm",
    "adaptive_norm": "single_scale_shift",
    "positional_embedding_type": "rope",
    "only_cross_attention": False,
    "double_self_attention": False,
}
_VAE_DEFAULTS: dict[str, Any] = {
    "dims": 3,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": 1,
    "norm_layer": "group_norm",
    "latent_log_var": "per_channel",
    "use_quant_conv": True,
    "normalize_latent_channels": False,
    "causal_decoder": False,
    "timestep_conditioning": False,
    "encoder_base_channels": 128,
    "decoder_base_channels": 128,
    "spatial_padding_mode": "zeros",
}
# The only values of which diffusers' classes have the arithmetic.
_TRANSFORMER_NEEDS: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "adaptive_norm": "single_scale_shift",
    "positional_embedding_type": "rope",
    "only_cross_attention": False,
    "double_self_attention": False,
}
_VAE_NEEDS: dict[str, Any] = {
    "dims": 3,
    "norm_layer": "pixel_norm",
    "latent_log_var": "uniform",
    "use_quant_conv": False,
    "normalize_latent_channels": False,
}
_SAMPLERS = {"Uniform": "uniform", "LinearQuadratic": "linear-quadratic", "Constant": "uniform"}


def read_checkpoint_file(file: TensorFile) -> Parts:
    """Raises CheckpointError with what was found and what was expected, for files of other kinds and mixed ones."""
    check_kind(file, CHECKPOINT)
    _check_names(file)
    transformer_tensors, vae_tensors = _below(file, _TRANSFORMER), _below(file, _VAE)
    stated = file.config() or {}
    try:
        vae_config = stated.get("vae") or guess_vae(_shapes(vae_tensors))
        modern = is_modern_vae(vae_config)
        config = stated.get("transformer") or guess_transformer(_shapes(transformer_tensors), causal_positions=modern)
        return Parts(
            transformer=_transformer(file.source, {**_TRANSFORMER_DEFAULTS, **config}, transformer_tensors),
            vae=_vae(file.source, {**_VAE_DEFAULTS, **vae_config}, vae_tensors),
            scheduler=_scheduler(stated, modern),
            causal_positions=bool(config.get("causal_temporal_positioning", False)),
            timestep_scale=float(config.get("timestep_scale_multiplier") or 1.0),
        )
    except KeyError as error:
        raise CheckpointError(f"{file.source} lacks {error.args[0]}: it is not whole, or of a kind not known") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file.source}: {error}") from None


def read_upsampler_file(file: TensorFile) -> Part:
    """The official spatial upscaler. Raises CheckpointError."""
    check_kind(file, UPSAMPLER)
    guessed = guess_upsampler(_shapes(file.tensors))
    stated = file.config() or {}
    config = {name: stated.get(name, value) for name, value in guessed.items()}
    if config["temporal_upsample"] or not config["spatial_upsample"]:
        raise CheckpointError(
            f"{file.source} upsamples in time; expected the spatial upscaler, which leaves time alone"
        )
    return Part(file.source, config, file.tensors)


def _transformer(source: str, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Part:
    _check_values("transformer", config, _TRANSFORMER_NEEDS)
    _check_sizes(config, transformer_sizes(_shapes(tensors)))
    frames, height, width = config["positional_embedding_max_pos"]
    rope = {"theta": config["positional_embedding_theta"]}
    rope |= {"base_num_frames": frames, "base_height": height, "base_width": width}
    return Part(
        source=f"{source} (transformer)",
        config={
            "in_channels": config["in_channels"],
            "out_channels": config.get("out_channels") or config["in_channels"],
            "num_attention_heads": config["num_attention_heads"],
            "attention_head_dim": config["attention_head_dim"],
            "cross_attention_dim": config["cross_attention_dim"],
            "num_layers": config["num_layers"],
            "caption_channels": config["caption_channels"],
            "attention_bias": config["attention_bias"],
            "norm_elementwise_affine": config["norm_elementwise_affine"],
            "norm_eps": config["norm_eps"],
        },
        tensors={diffusers_name(name): tensor for name, tensor in tensors.items()},
        attributes={f"rope.{name}": value for name, value in rope.items()},
    )


def _check_sizes(config: Mapping[str, Any], weights: Mapping[str, int]) -> None:
    """A config beside another model's weights, told in sizes instead of in a list of tensors. Raises ValueError."""
    stated = {**config, "width": config["num_attention_heads"] * config["attention_head_dim"]}
    stated["out_channels"] = config.get("out_channels") or config["in_channels"]
    wrong = [f"{name} {stated[name]} and {size}" for name, size in weights.items() if stated[name] != size]
    if wrong:
        raise ValueError(f"the transformer's config and its weights are not of one model: {', '.join(wrong)}")


def _vae(source: str, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Part:
    _check_values("vae", config, _VAE_NEEDS)
    timestep_conditioning = bool(config["timestep_conditioning"])
    encoder_blocks = config.get("encoder_blocks", config.get("blocks"))
    decoder_blocks = config.get("decoder_blocks", config.get("blocks"))
    try:
        encoder = group_encoder(encoder_blocks, config["encoder_base_channels"])
        decoder = group_decoder(
            decoder_blocks, config["decoder_base_channels"], timestep_conditioning=timestep_conditioning
        )
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the VAE's blocks cannot be built: {error}; found {encoder_blocks}, {decoder_blocks}"
        ) from None
    if encoder.strides != decoder.strides:
        raise ValueError(f"the VAE shrinks time and space by {encoder.strides} and grows them by {decoder.strides}")
    return Part(
        source=f"{source} (vae)",
        config={
            "in_channels": config["in_channels"],
            "out_channels": config["out_channels"],
            "latent_channels": config["latent_channels"],
            **encoder.config,
            **decoder.config,
            "timestep_conditioning": timestep_conditioning,
            "patch_size": config["patch_size"],
            "decoder_causal": bool(config["causal_decoder"]),
            "temporal_compression_ratio": encoder.strides[0],
            "spatial_compression_ratio": encoder.strides[1] * config["patch_size"],
        },
        tensors=_rename_vae(tensors, {**encoder.modules, **decoder.modules}),
        unused=decoder.unused,
        padding_mode=config["spatial_padding_mode"],
    )


def _rename_vae(tensors: Mapping[str, StoredTensor], modules: Mapping[str, str]) -> dict[str, StoredTensor]:
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(_STATISTICS):
            statistic = {"mean-of-means": "latents_mean", "std-of-means": "latents_std"}.get(name[len(_STATISTICS) :])
            if statistic:  # the others, such as mean-of-stds, describe the training data
                found[statistic] = tensor
        elif not _is_left_over(name, tensors):
            found[_vae_name(name, modules)] = tensor
    return found


def _vae_name(name: str, modules: Mapping[str, str]) -> str:
    path = ".".join(name.split(".")[:3])
    renamed = modules.get(path, path) + name[len(path) :]
    for official, ours in (
        (".res_blocks.", ".resnets."),
        (".conv_shortcut.", ".conv_shortcut.conv."),
        (".norm3.norm.", ".norm3."),
        (".last_time_embedder.", ".time_embedder."),
        (".last_scale_shift_table", ".scale_shift_table"),
    ):
        renamed = renamed.replace(official, ours)
    return renamed


def _is_left_over(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Norms that the model has not: the official loader drops them too (CausalVideoAutoencoder.load_state_dict)."""
    block, found, _ = name.partition(".norm3.")
    return ".norm" in name and not (found and f"{block}.conv_shortcut.weight" in tensors)


def _scheduler(stated: Mapping[str, Any], modern: bool) -> SchedulerConfig:
    """schedulers/rf.py, RectifiedFlowScheduler; without a config, those of the releases before and since 0.9.5."""
    allowed = stated.get("allowed_inference_steps")
    config = stated.get("scheduler")
    if config is None:
        config = {"sampler": "LinearQuadratic"} if modern else {"shifting": "SD3", "target_shift_terminal": 0.1}
    sampler, shifting = config.get("sampler", "Uniform"), config.get("shifting")
    if sampler not in _SAMPLERS or shifting not in (None, "SD3", "SimpleDiffusion"):
        raise ValueError(f"the scheduler's sampler {sampler} with shifting {shifting} is not known")
    values: dict[str, Any] = {"sampler": _SAMPLERS[sampler]}
    if shifting == "SD3":
        values |= {"use_dynamic_shifting": True, "shift_terminal": config.get("target_shift_terminal")}
        values |= {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
    elif shifting == "SimpleDiffusion":
        values["base_resolution"] = config.get("base_resolution", 32**2)
    if sampler == "Constant":
        if shifting is not None or config.get("shift") is None:
            raise ValueError("the scheduler's sampler Constant needs a shift, and no shifting beside it")
        values["shift"] = math.exp(config["shift"])
    return SchedulerConfig(**values, allowed_inference_steps=None if allowed is None else tuple(map(float, allowed)))


def _check_values(name: str, config: Mapping[str, Any], needs: Mapping[str, Any]) -> None:
    wrong = [f"{key} {config[key]!r}, expected {value!r}" for key, value in needs.items() if config[key] != value]
    if wrong:
        raise ValueError(f"the {name}'s config is of no model that can be rendered: {'; '.join(wrong)}")


def _check_names(file: TensorFile) -> None:
    scales = [name for name in file.tensors if name.endswith(_SCALES)]
    if scales:
        raise CheckpointError(
            f"{file.source} carries scales for its 8-bit weights ({len(scales)} tensors such as {scales[0]}); only fp8 "
            "files without scales, as the official ones are, can be read: take one of those, or the bf16 file"
        )
    foreign = [name for name in file.tensors if not name.startswith((_TRANSFORMER, _VAE))]
    if foreign:
        raise CheckpointError(
            f"{file.source} has {len(foreign)} tensors such as {foreign[0]} that are neither below {_TRANSFORMER} nor "
            f"below {_VAE}, where an official file keeps transformer and VAE"
        )


def _below(file: TensorFile, prefix: str) -> dict[str, StoredTensor]:
    return {name[len(prefix) :]: tensor for name, tensor in file.tensors.items() if name.startswith(prefix)}


def _shapes(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}
