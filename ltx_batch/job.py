"""JobSpec: the job file, every key with its default and its unit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ltx_batch.errors import JobError
from ltx_batch.request import DEFAULT_NEGATIVE_PROMPT, DEFAULT_SEED, MAX_WEIGHT, parse_lora
from ltx_batch.yaml_file import parse_yaml

Precision = Literal["auto", "fp32", "bf16", "int8", "int8-weight", "bnb-int8", "fp8"]
Placement = Literal["auto", "resident", "offload", "sharded"]
Attention = Literal["auto", "native", "sage"]
_SCHEDULES = (("timesteps", "num_inference_steps"), ("num_inference_steps", "timesteps"))


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSpec(_Section):
    """A LoRA file and how much of it; `PATH` or `PATH:WEIGHT` for short."""

    path: str = Field(min_length=1, description="path or URI of a safetensors file")
    weight: float = Field(1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        lora = parse_lora(value)
        return {"path": lora.path, "weight": lora.weight}


class ModelSpec(_Section):
    """Which weights, and how they are held."""

    checkpoint: str | None = Field(
        None,
        description="demo, an official name, a folder, an official file, a URI or hub id (owner/name@revision:file); "
        "None: the pipeline config's checkpoint_path",
    )
    text_encoder: str | None = Field(
        None,
        description="folder, URI or hub id with text_encoder/ and tokenizer/; None: the checkpoint's own, else the official",
    )
    upsampler: str | None = Field(
        None,
        description="spatial upscaler of multi-scale pipelines: official name or file, folder, URI or hub id; None: the "
        "checkpoint's own, else the pipeline config's",
    )
    pipeline_config: str | None = Field(
        None, description="path or URI of an official pipeline YAML; None: the checkpoint folder's own"
    )
    precision: Precision = "auto"
    text_precision: Precision = Field(
        "auto",
        description="of the text encoder; auto: as its files are quantised, else all in the numbers that the transformer's "
        "precision leaves. Part of the key unless it is auto",
    )
    placement: Placement = "auto"
    attention: Attention = Field(
        "auto",
        description="kernel of self-attention; auto: the fastest of torch's, by a stopwatch; native: torch's own choice; "
        "sage: SageAttention, which rounds to int8. Part of the key unless it is auto",
    )
    device_memory_gib: float | None = Field(
        None, gt=0, description="memory that one worker may use of each of its GPUs, GiB; None: what is free"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    llm_int8_threshold: float = Field(
        0.0, ge=0, description="bnb-int8 only: outlier threshold; 0 turns the decomposition off"
    )
    skip_modules: tuple[str, ...] = Field((), description="more name patterns of linear layers that stay unquantised")
    hadamard_group: Literal[0, 64, 256] | None = Field(
        None, description="int8 only: inputs that are rotated together before rounding; 0 for none, None: 64"
    )
    keep_blocks: int | None = Field(
        None, ge=0, description="blocks at each end that stay unquantised; None: one in fourteen, at most two"
    )
    loras: tuple[LoraSpec, ...] = Field(
        (), description="LoRA files of rows that have none of their own: path and weight, or PATH[:WEIGHT]"
    )
    renderer: Literal["ltx", "fake"] = Field(
        "ltx", description="fake renders colour bars and scripted faults, for tests"
    )


class RowDefaults(_Section):
    """What a row gets where its manifest has no such column, or null in it. Sizes in pixels, rate in Hz."""

    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    seed: int = Field(DEFAULT_SEED, ge=0, description="used where rows have neither seed nor row_id")
    height: int = 704
    width: int = 1216
    num_frames: int = 121
    frame_rate: float = 30.0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    stg_scale: float | None = None
    timesteps: tuple[float, ...] | None = None
    image_cond_noise_scale: float | None = None
    decode_timestep: float | None = None
    decode_noise_scale: float | None = None

    def fill(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What holds for a row: its own values by column, and these for the others. Of `timesteps` and
        `num_inference_steps` the row's one takes the place of the other here."""
        own = {name: row[name] for name in RowDefaults.model_fields if row.get(name) is not None}
        values = {**dict(self), **own}
        for name, other in _SCHEDULES:
            if name in own and other not in own:
                values[other] = None
        return values


class VideoSpec(_Section):
    """How frames become a file; part of the recipe."""

    codec: Literal["h264", "fake"] = Field(
        "h264", description="fake writes a few bytes in place of a video, for scale runs"
    )
    crf: int = Field(18, ge=0, le=51, description="constant rate factor: 0 lossless, 18 visually so, 51 worst")
    preset: str = Field("medium", description="x264 preset")
    threads: int = Field(1, ge=1, description="x264 threads; the bytes depend on it, so it is pinned")


class WorkerSpec(_Section):
    """What one actor holds."""

    num_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs, whole or a fraction; None: 1 where the cluster has GPUs and the device allows, else 0",
    )
    num_cpus: float = Field(1, gt=0)
    torch_threads: int = Field(1, ge=1, description="CPU threads of torch in one actor")
    in_flight: int = Field(
        2, ge=1, description="units an actor holds: one renders, the others are fetched, encoded or uploaded"
    )
    start_timeout_s: float = Field(1800, gt=0, description="time for the model to load")


class AttemptPolicy(_Section):
    """When a row is tried again, and when it is given up."""

    max_attempts: int = Field(3, ge=1, description="tries of a row that raises a retryable error")
    max_deaths: int = Field(2, ge=1, description="processes a row may end, alone in them, before it is failed")
    max_worker_deaths: int = Field(
        8, ge=1, description="deaths in a row without an ok render before a worker slot is given up"
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        description="seconds without progress before a worker is killed; None: ten times the predicted time, at least 600, and 3600 before the first clip",
    )


class StorageSpec(_Section):
    single_writer: bool = Field(
        False, description="accept a store that ignores create-only writes: this driver must then be the only one"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="fsspec options for every URI of the job, e.g. endpoint_url; keep secrets in the environment",
    )


def _check_workers(value: Any) -> Any:
    """One fault in place of one for each kind of value."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError("must be auto, or a whole number: 0 for this process alone, more for so many Ray actors")


class JobSpec(_Section):
    """One job file. `load_job` reads it; unknown keys are errors that name the nearest right key."""

    manifest: str = Field(description="file, folder or glob at any fsspec URI: Parquet, CSV or JSONL")
    output: str = Field(description="output prefix: a local folder or any fsspec URI")
    model: ModelSpec = Field(default_factory=ModelSpec)
    workers: Annotated[int | Literal["auto"], BeforeValidator(_check_workers)] = Field(
        "auto", description="0: in this process; a number or auto: Ray actors"
    )
    worker: WorkerSpec = Field(default_factory=WorkerSpec)
    text: Literal["inline", "stage", "precomputed"] = Field(
        "inline",
        description="who encodes prompts: each worker; a phase of its own before the workers start; nobody, all are cached",
    )
    text_cache: str | None = Field(
        None, description="folder or URI of the embeddings; None: OUTPUT/text where text is not inline, else no cache"
    )
    batch_size: int = Field(1, ge=1, description="rows of equal shape in one forward pass")
    shard_rows: int = Field(512, ge=1, description="rows a unit of bookkeeping")
    defaults: RowDefaults = Field(default_factory=RowDefaults)
    condition_preprocess: Literal["none", "official"] | None = Field(
        None,
        description="official: crop, blur and compress media as the official code does; None: official with a preset, else none",
    )
    video: VideoSpec = Field(default_factory=VideoSpec)
    attempts: AttemptPolicy = Field(default_factory=AttemptPolicy)
    stop_after_failures: int = Field(20, ge=1, description="failed rows before the first ok one that stop the run")
    max_failed_fraction: float | None = Field(
        None, ge=0, le=1, description="share of failed rows, of at least 100 finished, that stops the run"
    )
    gpu_hour_price: float | None = Field(None, ge=0, description="price of one GPU-hour, for the cost in summaries")
    on_failed_rows: Literal["exit1", "exit0"] = "exit1"
    storage: StorageSpec = Field(default_factory=StorageSpec)

    @property
    def text_cache_uri(self) -> str | None:
        """Where embeddings are kept; None: nowhere."""
        default = None if self.text == "inline" else f"{self.output.rstrip('/')}/text"
        return self.text_cache or default


def load_job(path: str | Path, *, overrides: Iterable[str] = (), text: str | None = None) -> JobSpec:
    """Read a job file and apply `a.b=c` overrides (values are YAML). Raises JobError with every fault at once."""
    try:
        data = parse_yaml(Path(path).read_text() if text is None else text)
    except FileNotFoundError:
        raise JobError(f"no job file at {path}; jobs/demo.yaml is a working one") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(data, dict):
        raise JobError(f"{path} must hold a mapping of keys such as manifest and output")
    for override in overrides:
        _set(data, override)
    return parse_job(data, source=str(path))


def parse_job(data: Mapping[str, Any], *, source: str = "job") -> JobSpec:
    try:
        return JobSpec.model_validate(data)
    except ValidationError as error:
        faults = [f"  {_describe(fault)}" for fault in error.errors()]
        raise JobError("\n".join([f"{source} has {len(faults)} fault(s):", *faults])) from None


def _set(data: dict[str, Any], override: str) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise JobError(f"--set {override}: write it as key=value, e.g. --set model.precision=bf16")
    *parents, leaf = name.split(".")
    for parent in parents:
        inner = data.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise JobError(
                f"--set {override}: {parent} holds no keys of its own; jobs/nightly.yaml shows where each key is"
            )
        data = inner
    try:
        data[leaf] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise JobError(f"--set {override}: the value is not YAML, quote it as a YAML file would: {error}") from None


def _describe(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        means = JobSpec.model_fields[where].description if where in JobSpec.model_fields else None
        return f"{where}: missing" + (f"; {means}" if means else "")
    if fault["type"] == "extra_forbidden":
        near = _nearest(fault["loc"])
        return f"{where}: unknown key; " + (f"did you mean {near}?" if near else "jobs/nightly.yaml has every key")
    said = fault["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    return f"{where}: {said} (found {fault['input']!r})"


def _nearest(loc: tuple[int | str, ...]) -> str | None:
    """The right key most like an unknown one: in its own section, or of much the same name in another; None: no key is."""
    names = [str(part) for part in loc if not isinstance(part, int)]
    section, leaf = ".".join(names[:-1]), names[-1]
    keys = list(_keys(JobSpec))
    siblings = {name.rpartition(".")[2]: name for name in keys if name.rpartition(".")[0] == section}
    anywhere = {name.rpartition(".")[2]: name for name in keys}
    for near, likeness in ((siblings, 0.6), (anywhere, 0.8)):
        close = difflib.get_close_matches(leaf, near, n=1, cutoff=likeness)
        if close:
            return near[close[0]]
    return None


def _keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    """Every key of a model and of the sections in it, also of those that a list has as entries."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys(kind, f"{prefix}{name}.")
