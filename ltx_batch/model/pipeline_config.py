"""PipelineConfig: the official pipeline YAML files, as they are. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ltx_batch.errors import JobError
from ltx_batch.model.presets import PRESETS
from ltx_batch.storage import read_uri
from ltx_batch.yaml_file import parse_yaml

FILE_NAME = "pipeline_config.yaml"
# A number, or a table with one entry for each of `guidance_timesteps`.
Scale = float | tuple[float, ...]
# A block, blocks, or a table of blocks.
Blocks = int | tuple[int, ...] | tuple[tuple[int, ...], ...]
STG_MODES = {
    "attention_values": "attention_values",
    "attention_skip": "attention_skip",
    "residual": "residual",
    "transformer_block": "transformer_block",
    "stg_av": "attention_values",
    "stg_as": "attention_skip",
    "stg_r": "residual",
    "stg_t": "transformer_block",
}
SAMPLERS = {
    "from_checkpoint": "from_checkpoint",
    "uniform": "uniform",
    "linear-quadratic": "linear-quadratic",
    "linearquadratic": "linear-quadratic",
}
_NAMED = {"stg_mode": STG_MODES, "sampler": SAMPLERS}
_PASSES = ("first_pass", "second_pass")
_TABLES = ("guidance_scale", "stg_scale", "rescaling_scale", "skip_block_list")
_Entry = TypeVar("_Entry")


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
    skip_block_list: Blocks | None = Field(None, description="blocks that spatio-temporal guidance perturbs")
    skip_initial_inference_steps: int = Field(0, ge=0)
    skip_final_inference_steps: int = Field(0, ge=0)
    cfg_star_rescale: bool = False
    tone_map_compression_ratio: float = Field(0.0, ge=0, le=1)

    def scale_at(self, table: Scale, sigma: float) -> float:
        """The entry of `table` that holds at `sigma`."""
        return self._entry(table, sigma) if isinstance(table, tuple) else table

    def blocks_at(self, sigma: float) -> tuple[int, ...]:
        """The blocks that are perturbed at `sigma`."""
        blocks = self.skip_block_list
        if blocks is None or isinstance(blocks, int):
            return () if blocks is None else (blocks,)
        table = _table(blocks)
        return self._entry(table, sigma) if table is not None else blocks  # type: ignore[return-value]

    def blocks(self) -> set[int]:
        """Every block that is perturbed at some sigma."""
        starts = self.guidance_timesteps or (1.0,)  # one sigma of each entry
        return {
            block for start in starts if self.scale_at(self.stg_scale, start) > 0 for block in self.blocks_at(start)
        }

    def _entry(self, table: tuple[_Entry, ...], sigma: float) -> _Entry:
        return table[self.entry_at(sigma)]

    def entry_at(self, sigma: float) -> int:
        """Which entry of the tables holds at `sigma`, 0 without tables.

        pipeline_ltx_video.py, guidance_mapping; in float32, as there: 0.985 of a schedule must meet 0.985 of a table.
        """
        level = float(np.float32(sigma))
        return next(
            (i for i, start in enumerate(self.guidance_levels) if start <= level), len(self.guidance_levels) - 1
        )

    @cached_property
    def guidance_levels(self) -> tuple[float, ...]:
        """`guidance_timesteps` as float32 holds them."""
        return tuple(float(np.float32(start)) for start in self.guidance_timesteps or (1.0,))


class PipelineConfig(PassConfig):
    """One official YAML file. Keys of the prompt enhancer are read and not acted on: prompts are rendered as written."""

    pipeline_type: Literal["base", "multi-scale"] = "base"
    checkpoint_path: str | None = None
    downscale_factor: float = Field(0.6666666, gt=0, le=1)
    spatial_upscaler_model_path: str | None = None
    first_pass: PassConfig | None = None
    second_pass: PassConfig | None = None
    stg_mode: Literal["attention_values", "attention_skip", "residual", "transformer_block"] = "attention_values"
    decode_timestep: float = Field(0.05, ge=0, le=1)
    decode_noise_scale: float | None = Field(None, ge=0, le=1, description="None: decode_timestep")
    image_cond_noise_scale: float = Field(0.15, ge=0)
    text_encoder_model_name_or_path: str | None = None
    precision: Literal["bfloat16", "float8_e4m3fn", "mixed_precision"] = "bfloat16"
    sampler: Literal["from_checkpoint", "uniform", "linear-quadratic"] = "from_checkpoint"
    stochastic_sampling: bool = False
    prompt_enhancement_words_threshold: int = 0
    prompt_enhancer_image_caption_model_name_or_path: str | None = None
    prompt_enhancer_llm_model_name_or_path: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_values(cls, data: Any) -> Any:
        """Modes and samplers in any case, and by their other names; ltx_video/inference.py, infer."""
        if not isinstance(data, dict):
            return data
        known = {name: value.lower() for name in _NAMED if isinstance(value := data.get(name), str)}
        return {**data, **{name: _NAMED[name].get(value, data[name]) for name, value in known.items()}}

    @model_validator(mode="after")
    def _check_passes(self) -> PipelineConfig:
        if self.pipeline_type == "multi-scale" and None in (self.first_pass, self.second_pass):
            raise ValueError("a multi-scale pipeline needs both first_pass and second_pass")
        sections = ("",) if self.pipeline_type == "base" else tuple(f"{name}." for name in _PASSES)
        faults = {
            section + name: rule
            for section, one in zip(sections, self.passes, strict=True)
            for name, rule in _table_faults(one)
        }
        if faults:
            raise _Faults(faults)
        return self

    @property
    def passes(self) -> tuple[PassConfig, ...]:
        """What each pass does. In a multi-scale pipeline a key of the pass wins over the same key beside the passes
        (pipeline_ltx_video.py, LTXMultiScalePipeline)."""
        return (self,) if self.pipeline_type == "base" else self.merged_passes

    @cached_property
    def merged_passes(self) -> tuple[PassConfig, ...]:
        """The passes of a multi-scale pipeline, each with the keys beside them. Every plan asks for them."""
        shared = {name: getattr(self, name) for name in self.model_fields_set & PassConfig.model_fields.keys()}
        given = [one.model_dump(exclude_unset=True) for one in (self.first_pass, self.second_pass) if one is not None]
        return tuple(PassConfig.model_validate({**shared, **values}) for values in given)

    def blocks_fault(self, count: int) -> str | None:
        """What is wrong with this config for a transformer of so many blocks."""
        return absent_block({block for one in self.passes for block in one.blocks()}, count)

    def resolve_precision(self) -> str:
        """The project's name for what the file asks for. (Officially `mixed_precision` runs the same bf16 weights under
        autocast, which keeps some elementwise sums in fp32.)"""
        return {"bfloat16": "bf16", "float8_e4m3fn": "fp8", "mixed_precision": "bf16"}[self.precision]


def absent_block(blocks: Iterable[int], count: int) -> str | None:
    """The fault of naming blocks that a transformer of `count` blocks does not have."""
    absent = sorted(block for block in blocks if not 0 <= block < count)
    if not absent:
        return None
    return (
        f"skip_block_list names block {absent[0]}, and this transformer has blocks 0 to {count - 1}: is the pipeline config "
        "for another model?"
    )


class _Faults(ValueError):
    """Rules that the keys of a pass break together, by key."""

    def __init__(self, by_key: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{key} {rule}" for key, rule in by_key.items()))
        self.by_key = by_key


def _table_faults(one: PassConfig) -> Iterator[tuple[str, str]]:
    """Keys of a pass and the rules that they break: a table has an entry for each of `guidance_timesteps`, which fall."""
    starts = one.guidance_timesteps or ()
    for before, after in pairwise(starts):
        if after >= before:
            yield "guidance_timesteps", f"must fall from entry to entry, found {before:g} and then {after:g}"
            break
    for name in _TABLES:
        entries = _table(getattr(one, name))
        if entries is not None and len(entries) != len(starts):
            yield name, f"has {len(entries)} entries, and guidance_timesteps has {len(starts)}"


def _table(value: Any) -> tuple[Any, ...] | None:
    """`value` where it is a table: numbers for a scale, tuples for blocks."""
    if isinstance(value, tuple) and value and (isinstance(value[0], tuple | float)):
        return value
    return None


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
    """The config of that name: a preset, a path or a URI; else the one in the checkpoint's `folder`; else the official
    base defaults.

    Raises JobError with every fault at once: an unreadable file, unknown keys (the nearest is named), wrong values.
    """
    if named is None:
        beside = folder / FILE_NAME if folder is not None else None
        if beside is None or not beside.is_file():
            return PipelineConfig(decode_noise_scale=0.025)
        named = str(beside)
    if named in PRESETS:
        return PipelineConfig.model_validate(dict(PRESETS[named]))
    try:
        data = parse_yaml(_read(named, options))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobError(f"the pipeline config {named} cannot be read: {error}") from None
    return parse_pipeline_config(data, source=named)


def _read(named: str, options: Mapping[str, Any] | None) -> bytes:
    try:
        return read_uri(named, options)
    except FileNotFoundError:
        close = difflib.get_close_matches(named, PRESETS, n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise JobError(
            f"no pipeline config at {named}: give the path or URI of an official YAML file, or a preset{meant} "
            f"(presets: {', '.join(PRESETS)})"
        ) from None
    except OSError as error:
        raise JobError(f"the pipeline config {named} cannot be read: {error}") from None


def parse_pipeline_config(data: Any, *, source: str) -> PipelineConfig:
    """Raises JobError as `load_pipeline_config` does."""
    if not isinstance(data, dict):
        raise JobError(f"{source} must hold a mapping of keys such as guidance_scale and timesteps")
    try:
        return PipelineConfig.model_validate(data)
    except ValidationError as error:
        # pydantic reports a union once for each of its members; one line a key is enough.
        faults = {where: rule for fault in error.errors() for where, rule in _told(fault).items()}
        lines = [f"  {where}: {rule}" for where, rule in faults.items()]
        raise JobError("\n".join([f"{source} has {len(lines)} fault(s):", *lines])) from None


def _told(fault: Any) -> Mapping[str, str]:
    """Rules by key: one fault of pydantic's, or all that a pass breaks."""
    inner = fault.get("ctx", {}).get("error")
    return inner.by_key if isinstance(inner, _Faults) else {_where(fault["loc"]): _describe(fault)}


def _where(loc: tuple[int | str, ...]) -> str:
    """The key of a fault, as it is written in the file; a fault of the file as a whole has none."""
    return ".".join(map(str, loc[: 2 if loc and loc[0] in _PASSES else 1])) or "as a whole"


def _describe(fault: Any) -> str:
    if fault["type"] == "value_error":
        return str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] != "extra_forbidden":
        return f"{fault['msg']} (found {fault['input']!r})"
    keys = (PassConfig if fault["loc"][0] in _PASSES else PipelineConfig).model_fields
    close = difflib.get_close_matches(str(fault["loc"][-1]), keys, n=1, cutoff=0.5)
    return "unknown key" + (f"; did you mean {close[0]}?" if close else "")
