"""Pipeline configs by the names of the official YAML files, with their values. No torch.

Values: Lightricks/LTX-Video, configs/*.yaml at commit 5260738; those of 0.9.7, which the repository dropped since, at the
parent of 02844ce.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_COMMON: dict[str, Any] = {
    "stg_mode": "attention_values",
    "decode_timestep": 0.05,
    "decode_noise_scale": 0.025,
    "text_encoder_model_name_or_path": "PixArt-alpha/PixArt-XL-2-1024-MS",
    "precision": "bfloat16",
    "sampler": "from_checkpoint",
    "prompt_enhancement_words_threshold": 120,
    "prompt_enhancer_image_caption_model_name_or_path": "MiaoshouAI/Florence-2-large-PromptGen-v2.0",
    "prompt_enhancer_llm_model_name_or_path": "unsloth/Llama-3.2-3B-Instruct",
    "stochastic_sampling": False,
}
_PLAIN = {"guidance_scale": 1, "stg_scale": 0, "rescaling_scale": 1}
_DISTILLED: dict[str, Any] = {
    "first_pass": {"timesteps": (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725), **_PLAIN, "skip_block_list": [42]},
    "second_pass": {"timesteps": (0.9094, 0.725, 0.4219), **_PLAIN, "skip_block_list": [42]},
}
_TONE_MAPPED = {**_DISTILLED, "second_pass": {**_DISTILLED["second_pass"], "tone_map_compression_ratio": 0.6}}
_DEV: dict[str, Any] = {
    "first_pass": {
        "guidance_scale": [1, 1, 6, 8, 6, 1, 1],
        "stg_scale": [0, 0, 4, 4, 4, 2, 1],
        "rescaling_scale": [1, 1, 0.5, 0.5, 1, 1, 1],
        "guidance_timesteps": [1.0, 0.996, 0.9933, 0.985, 0.9767, 0.9008, 0.618],
        "skip_block_list": [[], [11, 25, 35, 39], [22, 35, 39], [28], [28], [28], [28]],
        "num_inference_steps": 30,
        "skip_final_inference_steps": 3,
        "cfg_star_rescale": True,
    },
    "second_pass": {
        "guidance_scale": [1],
        "stg_scale": [1],
        "rescaling_scale": [1],
        "guidance_timesteps": [1.0],
        "skip_block_list": [27],
        "num_inference_steps": 30,
        "skip_initial_inference_steps": 17,
        "cfg_star_rescale": True,
    },
}
_GUIDED = {
    "guidance_scale": 3,
    "stg_scale": 1,
    "rescaling_scale": 0.7,
    "skip_block_list": [19],
    "num_inference_steps": 40,
}


def _multi_scale(release: str, checkpoint: str, passes: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        **_COMMON,
        "pipeline_type": "multi-scale",
        "checkpoint_path": f"{checkpoint}.safetensors",
        "downscale_factor": 0.6666666,
        "spatial_upscaler_model_path": f"ltxv-spatial-upscaler-{release}.safetensors",
        **passes,
        **changes,
    }


def _with_fp8(release: str, name: str, passes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    fp8 = f"{name}-fp8"
    return {
        name: _multi_scale(release, name, passes),
        fp8: _multi_scale(release, fp8, passes, precision="float8_e4m3fn"),
    }


def _base(checkpoint: str, **values: Any) -> dict[str, Any]:
    return {**_COMMON, "pipeline_type": "base", "checkpoint_path": f"{checkpoint}.safetensors", **values}


PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        **_with_fp8("0.9.8", "ltxv-13b-0.9.8-distilled", _TONE_MAPPED),
        **_with_fp8("0.9.8", "ltxv-13b-0.9.8-dev", _DEV),
        **_with_fp8("0.9.8", "ltxv-2b-0.9.8-distilled", _DISTILLED),
        **_with_fp8("0.9.7", "ltxv-13b-0.9.7-distilled", _DISTILLED),
        **_with_fp8("0.9.7", "ltxv-13b-0.9.7-dev", _DEV),
        "ltxv-2b-0.9.6-distilled": _base(
            "ltxv-2b-0.9.6-distilled-04-25", **_PLAIN, num_inference_steps=8, stochastic_sampling=True
        ),
        "ltxv-2b-0.9.6-dev": _base("ltxv-2b-0.9.6-dev-04-25", **_GUIDED),
        "ltxv-2b-0.9.5": _base("ltx-video-2b-v0.9.5", **_GUIDED),
        "ltxv-2b-0.9.1": _base("ltx-video-2b-v0.9.1", **_GUIDED),
        "ltxv-2b-0.9": _base("ltx-video-2b-v0.9", **_GUIDED),
    }
)
