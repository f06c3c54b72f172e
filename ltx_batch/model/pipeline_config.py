"""PipelineConfig: the official pipeline YAML files, as they are. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ltx_batch.errors import JobError
from ltx_batch.storage import read_uri

FILE_NAME = "pipeline_config.yaml"
# A number, or a table with one entry for each of `guidance_timesteps`.
Scale = float | tuple[float, ...]


def _check_falling(sigmas: Any) -> Any:
    check_sigmas(sigmas) if sigmas is not None else None
    return sigmas


class PassConfig(BaseModel):
    """What one pass does. Defaults are those of the official base configs (LTX-Video, configs/ltxv-2b-0.9.5.yaml),
    without spatio-temporal guidance: its block list belongs to one model, so no default can name it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timesteps: Annotated[tuple[float, ...] | None, BeforeValidator(_check_falling)] = Field(
        None, description="sigmas in (0, 1], falling, without the final 0; None: made from num_inference_steps"
    )
    num_inference_steps: int = Field(40, ge=1, description="ignored where timesteps are given")
    guidance_scale: Scale = 3.0
    stg_scale: Scale = 0.0
    rescaling_scale: Scale = 0.7
    guidance_timesteps: tuple[float, ...] | None = Field(
        None, description="the first entry at or below the current sigma picks from the tables"
    )
    skip_block_list: int | tuple[int | tuple[int, ...], ...] | None = None
    skip_initial_inference_steps: int = Field(0, ge=0)
    skip_final_inference_steps: int = Field(0, ge=0)
    cfg_star_rescale: bool = False
    tone_map_compression_ratio: float = Field(0.0, ge=0, le=1)

    def scale_at(self, table: Scale, sigma: float) -> float:
        """The entry of `table` that holds at `sigma`; pipeline_ltx_video.py, guidance_mapping."""
        if not isinstance(table, tuple):
            return table
        starts = self.guidance_timesteps or ()
        index = next((i for i, start in enumerate(starts) if start <= sigma), len(starts) - 1)
        return table[index]


class PipelineConfig(PassConfig):
    """One official YAML file. Keys of the prompt enhancer are read and not acted on: prompts are rendered as written."""

    pipeline_type: Literal["base", "multi-scale"] = "base"
    checkpoint_path: str | None = None
    downscale_factor: float = 0.6666666
    spatial_upscaler_model_path: str | None = None
    first_pass: PassConfig | None = None
    second_pass: PassConfig | None = None
    stg_mode: Literal[
        "attention_values", "attention_skip", "residual", "transformer_block", "stg_av", "stg_as", "stg_r", "stg_t"
    ] = "attention_values"
    decode_timestep: float = Field(0.05, ge=0, le=1)
    decode_noise_scale: float | None = Field(0.025, ge=0, le=1, description="None: decode_timestep")
    image_cond_noise_scale: float = Field(0.15, ge=0)
    text_encoder_model_name_or_path: str | None = None
    precision: Literal["bfloat16", "float8_e4m3fn", "mixed_precision"] = "bfloat16"
    sampler: Literal["from_checkpoint", "uniform", "linear-quadratic"] = "from_checkpoint"
    stochastic_sampling: bool = False
    prompt_enhancement_words_threshold: int = 0
    prompt_enhancer_image_caption_model_name_or_path: str | None = None
    prompt_enhancer_llm_model_name_or_path: str | None = None


def check_sigmas(sigmas: Any) -> None:
    """Raises ValueError unless `sigmas` are numbers in (0, 1] that fall from step to step."""
    if not sigmas:
        raise ValueError("timesteps must not be empty")
    if any(sigma > 1 for sigma in sigmas):
        raise ValueError(
            f"timesteps must be at most 1 (they are sigmas; divide by 1000 what other tools count to 1000), found {max(sigmas)}"
        )
    if any(sigma <= 0 for sigma in sigmas):
        raise ValueError(f"timesteps must be above 0 (the final 0 is added), found {min(sigmas)}")
    for before, after in pairwise(sigmas):
        if after >= before:
            raise ValueError(f"timesteps must fall from step to step, found {before} and then {after}")


def load_pipeline_config(
    named: str | None, folder: Path | None = None, *, options: Mapping[str, Any] | None = None
) -> PipelineConfig:
    """The config at `named` (path or URI); else the one in the checkpoint's `folder`; else the official base defaults.

    Raises JobError with every fault at once: an unreadable file, unknown keys (the nearest is named), wrong values,
    and what is not built yet.
    """
    if named is None:
        beside = folder / FILE_NAME if folder is not None else None
        if beside is None or not beside.is_file():
            return PipelineConfig.model_validate({})
        named = str(beside)
    try:
        data = yaml.safe_load(read_uri(named, options))
    except FileNotFoundError:
        raise JobError(f"no pipeline config at {named}; give the path or URI of an official YAML file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobError(f"the pipeline config {named} cannot be read: {error}") from None
    return parse_pipeline_config(data, source=named)


def parse_pipeline_config(data: Any, *, source: str) -> PipelineConfig:
    """Raises JobError as `load_pipeline_config` does."""
    if not isinstance(data, dict):
        raise JobError(f"{source} must hold a mapping of keys such as guidance_scale and timesteps")
    try:
        config = PipelineConfig.model_validate(data)
    except ValidationError as error:
        # pydantic reports a union once for each of its members; one line a key is enough.
        faults = {
            ".".join(map(str, fault["loc"][: 2 if fault["loc"][0] in _PASSES else 1])): fault
            for fault in error.errors()
        }
        lines = [f"  {where}: {_describe(fault)}" for where, fault in faults.items()]
        raise JobError("\n".join([f"{source} has {len(lines)} fault(s):", *lines])) from None
    unbuilt = _unbuilt(config)
    if unbuilt:
        raise JobError(
            f"{source} asks for what is not built yet: {', '.join(unbuilt)}; base pipelines with plain guidance work"
        )
    return config


_PASSES = ("first_pass", "second_pass")


def _describe(fault: Any) -> str:
    if fault["type"] != "extra_forbidden":
        return f"{fault['msg']} (found {fault['input']!r})"
    keys = (PassConfig if fault["loc"][0] in _PASSES else PipelineConfig).model_fields
    close = difflib.get_close_matches(str(fault["loc"][-1]), keys, n=1, cutoff=0.5)
    return "unknown key" + (f"; did you mean {close[0]}?" if close else "")


def _unbuilt(config: PipelineConfig) -> list[str]:
    stg = config.stg_scale if isinstance(config.stg_scale, tuple) else (config.stg_scale,)
    asked = {
        "pipeline_type: multi-scale": config.pipeline_type == "multi-scale",
        "stg_scale above 0": max(stg) > 0,
        "cfg_star_rescale": config.cfg_star_rescale,
        "skip_initial_inference_steps": config.skip_initial_inference_steps > 0,
        "skip_final_inference_steps": config.skip_final_inference_steps > 0,
        "tone_map_compression_ratio": config.tone_map_compression_ratio > 0,
        "stochastic_sampling": config.stochastic_sampling,
        f"precision: {config.precision}": config.precision != "bfloat16",
    }
    return [what for what, wanted in asked.items() if wanted]
