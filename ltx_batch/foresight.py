"""Foresight: what a job's model tells before anything is loaded, and what it cannot tell here, and why. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from ltx_batch.errors import CheckpointError, InvalidRow, PrecisionError, RowIssue, job_issue
from ltx_batch.job import JobSpec, ModelSpec
from ltx_batch.lora import Shapes
from ltx_batch.manifest import Manifest, Validation, validate
from ltx_batch.model.catalog import TEXT_ENCODER
from ltx_batch.model.fetch import HubPlace, locate
from ltx_batch.model.frames import MediaProbe
from ltx_batch.model.hub import cached_file
from ltx_batch.model.layers import transformer_layers
from ltx_batch.model.memory import ModelSizes
from ltx_batch.model.part import read_component
from ltx_batch.model.parts import open_checkpoint
from ltx_batch.model.pipeline_config import PipelineConfig, absent_block, load_pipeline_config
from ltx_batch.model.plan import Plan, plan_request
from ltx_batch.model.quantize import policy
from ltx_batch.model.room import TextSizes
from ltx_batch.model.sigmas import SchedulerConfig
from ltx_batch.model.sizes import sizes_of, text_sizes
from ltx_batch.model.sources import find_sources
from ltx_batch.model.text_precision import text_policy
from ltx_batch.renderer import resolve_checkpoint, resolve_precision
from ltx_batch.request import RenderRequest
from ltx_batch.storage import is_local_uri

_TOKENIZERS = ("tokenizer.json", "spiece.model")
_PLAIN = "rows are planned with plain steps, as those of the releases from 0.9.5 on"
Options = Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Foresight:
    """`errors` keep the job's model from being loaded. `unchecked` are the checks that cannot be made here, each with its
    reason; `assumed` is said of the plans where the checkpoint's own schedule is not at hand."""

    planner: Callable[[RenderRequest], Plan]
    layers: Callable[[], Shapes | None]
    tokenizer: Path | None
    errors: tuple[RowIssue, ...] = ()
    unchecked: tuple[RowIssue, ...] = ()
    assumed: tuple[RowIssue, ...] = ()


def validate_job(manifest: Manifest, job: JobSpec) -> Validation:
    """Every row and the job's own values against all that can be known here. Raises as `validate` does, JobError where the
    pipeline config is wrong."""
    seen = foresee(job.model, job.storage.options)
    return validate(
        manifest,
        job,
        tokenizer=seen.tokenizer,
        layers=seen.layers,
        planner=seen.planner,
        probe=MediaProbe(),
        errors=seen.errors,
        warnings=seen.unchecked + seen.assumed,
    )


def foresee(model: ModelSpec, options: Options = None) -> Foresight:
    """Small files and headers are read, no weights. Raises JobError where the pipeline config is wrong."""
    if model.renderer == "fake":
        config = load_pipeline_config(model.pipeline_config, options=options)
        return Foresight(partial(plan_request, config=config, scheduler=SchedulerConfig()), lambda: None, None)
    config, scheduler, fault = _schedule(model, options)
    named = _checkpoint(model, config)
    layers = cache(lambda: transformer_layers(resolve_checkpoint(named), options) if named else None)
    tokenizer, unread = tokenizer_file(model, config)
    errors = _missing(model) + _blocks_fault(model, config, layers) + _precision_faults(model, options)
    assumed = []
    if fault is not None:
        about = job_issue("model.checkpoint", named, str(fault))
        certain = not errors and (named is None or not isinstance(_place(named), HubPlace))
        errors += [about] if certain else []
        assumed = [job_issue("model.checkpoint", named, f"{_PLAIN}: {fault}")]
    return Foresight(
        planner=partial(_plan, config=config, scheduler=scheduler or SchedulerConfig(), layers=layers),
        layers=layers,
        tokenizer=tokenizer,
        errors=tuple(errors),
        unchecked=(*unread, *_blocks_unchecked(model, config, layers)),
        assumed=tuple(assumed),
    )


def _schedule(
    model: ModelSpec, options: Options
) -> tuple[PipelineConfig, SchedulerConfig | None, CheckpointError | None]:
    """The pipeline config, and the checkpoint's scheduler, or why it is not at hand."""
    try:
        sources, config = find_sources(
            resolve_checkpoint(model.checkpoint or ""), pipeline_config=model.pipeline_config, options=options
        )
    except CheckpointError as error:
        return load_pipeline_config(model.pipeline_config, options=options), None, error
    try:
        return config, sources.schedule(options), None
    except CheckpointError as error:
        return config, None, error


def _checkpoint(model: ModelSpec, config: PipelineConfig) -> str | None:
    return model.checkpoint or (config.checkpoint_path if model.pipeline_config else None)


def _plan(
    request: RenderRequest, config: PipelineConfig, scheduler: SchedulerConfig, layers: Callable[[], Shapes | None]
) -> Plan:
    """Also holds the blocks that a row's own stg_scale perturbs against the transformer's."""
    plan = plan_request(request, config, scheduler)
    if request.stg_scale:
        blocks = {block for one in plan.passes for step in one.guidance for block in step.skip_blocks}
        if blocks and (shapes := layers()) and (fault := absent_block(blocks, _block_count(shapes))):
            raise InvalidRow(f"stg_scale above 0 cannot be had: {fault}", columns=("stg_scale",))
    return plan


def _blocks_fault(model: ModelSpec, config: PipelineConfig, layers: Callable[[], Shapes | None]) -> list[RowIssue]:
    shapes = layers() if any(one.blocks() for one in config.passes) else None
    fault = config.blocks_fault(_block_count(shapes)) if shapes else None
    return [] if fault is None else [job_issue("model.pipeline_config", model.pipeline_config, fault)]


def _precision_faults(model: ModelSpec, options: Options) -> list[RowIssue]:
    """Precisions that the files cannot be used with, where those are at hand."""
    looks: dict[str, Callable[[], object]] = {
        "precision": lambda: model_sizes(model, options),
        "text_precision": lambda: text_sizes_of(model, 2, options),
    }
    faults = []
    for key, look in looks.items():
        try:
            look()
        except PrecisionError as error:
            faults.append(job_issue(f"model.{key}", getattr(model, key), str(error)))
        except CheckpointError:  # told by what misses them
            pass
    return faults


def _blocks_unchecked(model: ModelSpec, config: PipelineConfig, layers: Callable[[], Shapes | None]) -> list[RowIssue]:
    if not any(one.blocks() for one in config.passes) or layers():
        return []
    rule = "skip_block_list is not held against the transformer's blocks: its files are not at hand"
    return [job_issue("model.checkpoint", _checkpoint(model, config), rule)]


def _block_count(shapes: Shapes) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith(f"{policy.BLOCKS}.")})


# where things are


def _missing(model: ModelSpec) -> list[RowIssue]:
    """Local paths at which there is nothing."""
    named = {name: getattr(model, name) for name in ("checkpoint", "text_encoder", "upsampler")}
    faults = {name: _nothing_at(value) for name, value in named.items() if value is not None}
    return [job_issue(f"model.{name}", named[name], fault) for name, fault in faults.items() if fault is not None]


def _nothing_at(name: str) -> str | None:
    """The fault of a name that can mean nothing but a path, and nothing is there; `owner/name` may be at the hub."""
    place = _place(name)
    if isinstance(place, CheckpointError):
        return str(place)
    is_path = is_local_uri(name) and name.startswith((".", "/", "~", "file://"))
    return "there is no such file or folder" if is_path and not _path(name).exists() else None


def _place(name: str) -> str | HubPlace | CheckpointError:
    """Where the checkpoint of that name is, or why nobody knows."""
    try:
        return locate(resolve_checkpoint(name))
    except CheckpointError as error:
        return error


def _path(name: str) -> Path:
    return Path(name.removeprefix("file://")).expanduser()


def tokenizer_file(model: ModelSpec, config: PipelineConfig | None = None) -> tuple[Path | None, list[RowIssue]]:
    """The model's tokenizer.json, else its spiece.model, where they lie on this machine, for counting tokens without the
    model; else None, and the check that cannot be made."""
    official = TEXT_ENCODER if config is None else config.text_encoder_model_name_or_path or TEXT_ENCODER
    if model.text_encoder is not None:
        key, names = "model.text_encoder", [model.text_encoder]
    else:
        key, names = "model.checkpoint", [model.checkpoint or "", official]
    for name in filter(None, names):
        for file in _TOKENIZERS:
            found = _local_file(name, f"tokenizer/{file}")
            if found is not None:
                return found, []
    rule = f"prompts are not counted in tokens: no tokenizer of {' or '.join(filter(None, names))} lies on this machine"
    return None, [job_issue(key, getattr(model, key.removeprefix("model.")), rule)]


def _local_file(name: str, file: str) -> Path | None:
    """A file of a checkpoint's folder, where that lies here or in the hub's cache."""
    place = _place(name)
    if isinstance(place, HubPlace):
        return cached_file(place.repo, place.revision, file)
    path = None if isinstance(place, CheckpointError) else _path(place) / file
    return path if path is not None and path.is_file() else None


def text_sizes_of(model: ModelSpec, number_bytes: int, options: Options = None) -> TextSizes:
    """How large the job's text encoder is beside a transformer whose unquantised numbers take so many bytes, from headers.

    Raises CheckpointError where its files are not on this machine, or are not what they should be.
    """
    sources, _ = find_sources(
        resolve_checkpoint(model.checkpoint or ""),
        pipeline_config=model.pipeline_config,
        text_encoder=None if model.text_encoder is None else resolve_checkpoint(model.text_encoder),
        options=options,
    )
    named = sources.text_encoder or sources.checkpoint
    config = _local_file(named, "text_encoder/config.json")
    if config is None:
        raise CheckpointError(f"{named} is not on this machine")
    part = read_component(config.parent, "text_encoder")
    device, dtype = "cpu" if model.device == "cpu" else "cuda", "float32" if number_bytes == 4 else "bfloat16"
    return text_sizes(part, text_policy(model.text_precision, dtype, device, part.stored))  # type: ignore[arg-type]


def model_sizes(model: ModelSpec, options: Options = None) -> ModelSizes:
    """How large a job's model is, from the headers of its files. `auto` is taken as on a GPU, unless the device is cpu.

    Raises CheckpointError where they are not on this machine, or are not what they should be.
    """
    device = "cpu" if model.device == "cpu" else "cuda"
    sources, config = find_sources(
        resolve_checkpoint(model.checkpoint or ""),
        pipeline_config=model.pipeline_config,
        upsampler=model.upsampler,
        options=options,
    )
    checkpoint, upsampler = Path(sources.checkpoint), None if sources.upsampler is None else Path(sources.upsampler)
    for place in (checkpoint, upsampler):
        if place is not None and not place.exists():
            raise CheckpointError(f"{place} is not on this machine")
    opened = open_checkpoint(checkpoint, upsampler=upsampler)
    stored = opened.transformer.stored
    name: str = model.precision
    if name == "auto":
        name = stored.name if stored else resolve_precision(name, device, config).name
    chosen = (stored.policy if stored else policy.precision)(
        name, device, skip=model.skip_modules, hadamard_group=model.hadamard_group, keep_blocks=model.keep_blocks
    )
    return sizes_of(opened, chosen)
