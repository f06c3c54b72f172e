"""Renderer: requests in, clips out. The seam between the model and everything else; importing it loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ltx_batch.clip import Clip
from ltx_batch.errors import CheckpointError, JobError
from ltx_batch.job import JobSpec, ModelSpec
from ltx_batch.lora import Shapes
from ltx_batch.model.attention_choice import check_attention
from ltx_batch.model.expected import Expected, check_config
from ltx_batch.model.frames import load_media
from ltx_batch.model.layers import transformer_layers, transformer_stored
from ltx_batch.model.pipeline_config import PipelineConfig
from ltx_batch.model.placement import check_name
from ltx_batch.model.plan import Plan, plan_request
from ltx_batch.model.quantize import policy
from ltx_batch.model.read_ahead import read_ahead
from ltx_batch.model.sources import Sources, find_sources
from ltx_batch.model.text_key import TextIdentity, encoder_fingerprint
from ltx_batch.model.text_precision import embedding_precision
from ltx_batch.request import RenderRequest
from ltx_batch.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor

    from ltx_batch.model.pipeline import LtxPipeline
    from ltx_batch.model.trace import Trace

PACKAGED = Path(__file__).parent / "checkpoints"
PACKAGED_NAMES = ("demo",)  # a folder of the same name is ./demo


class Renderer(Protocol):
    """What a worker needs to know of a model."""

    weights_bytes: Mapping[str, int]
    device: str
    precision: str

    def prepare(self, request: RenderRequest) -> RenderRequest:
        """Do what can be done before the request's turn, from any thread; returns what `render` then takes.

        Raises RowError where it cannot be rendered.
        """
        ...

    def render(self, requests: Sequence[RenderRequest], *, unquantised: bool = False) -> list[Clip]:
        """Clips of requests that share one `batch_key()`, in order. `unquantised`: what the model's precision rounds to
        8 bits is not rounded this time. Raises NotFinite where that may help."""
        ...

    def close(self) -> None: ...


class LtxRenderer:
    """LTX-Video on one device.

    `weights_bytes` are bytes by part on the device, `device` is "cpu" or the GPU's model, `precision` the resolved name.
    """

    def __init__(
        self,
        pipeline: LtxPipeline,
        config: PipelineConfig,
        *,
        condition_preprocess: str = "none",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._config = config
        self._preprocess = condition_preprocess
        self._options = options
        self.weights_bytes: Mapping[str, int] = dict(pipeline.weights_bytes)
        self.device: str = pipeline.ran["device"]
        self.precision: str = pipeline.ran["precision"]

    def plan(self, request: RenderRequest) -> Plan:
        """What rendering the request will do. Raises InvalidRow."""
        return plan_request(request, self._config, self._pipeline.scheduler)

    def prepare(self, request: RenderRequest) -> RenderRequest:
        """Read and pre-process the request's media, and fetch its embeddings from the text cache, where there is one.

        Raises EmbeddingMissing, InvalidRow, MediaError.
        """
        self._pipeline.text.fetch(request.prompt)
        if self.plan(request).needs_negative:
            self._pipeline.text.fetch(request.negative_prompt, negative=True)
        return self._with_media(request)

    def _with_media(self, request: RenderRequest) -> RenderRequest:
        from ltx_batch.model.preprocess import preprocess_request

        return preprocess_request(load_media(request, self._options), self._preprocess)

    def render(self, requests: Sequence[RenderRequest], *, unquantised: bool = False) -> list[Clip]:
        """Clips in order; a stage's seconds are shared evenly among the clips of a batch. `unquantised`: by a transformer
        that is loaded for this call alone, and such clips are marked degraded.

        Media may be uint8 arrays, paths or URIs. Raises ValueError where the requests do not share a batch key,
        InvalidRow where one breaks a rule of the model, MediaError where media are unreadable or too short,
        EmbeddingMissing where the text cache lacks a prompt and there is no text encoder, NotFinite where the model's
        numbers overflow.
        """
        from ltx_batch.model.render import render_batch

        if len({request.batch_key() for request in requests}) > 1:
            raise ValueError("the requests of one render call must share their batch_key()")
        plans = [self.plan(request) for request in requests]
        prepared = [self._with_media(request) for request in requests]
        if not requests:
            return []
        with self._pipeline.unquantised() if unquantised else nullcontext():
            return render_batch(self._pipeline, plans[0], prepared, self._preprocess)

    def trace(
        self,
        request: RenderRequest,
        *,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        conditions: Sequence[tuple[Tensor, int, float]] | None = None,
        noise: Callable[[str, tuple[int, ...]], Tensor] | None = None,
    ) -> Trace:
        """Render one request with what another implementation used, and return all that comes of it.

        Embeddings are [1, tokens, channels] with masks [1, tokens]; no text encoder is needed where they are given.
        `conditions` are `(pixels [1, 3, F, H, W] in [-1, 1], start_frame, strength)`, pre-processed, of the padded target
        size (each pass resizes them); they take the place of the request's. `noise(name, shape)` gives every draw:
        docs/pipeline.md lists names and shapes. Raises ValueError where tensors do not fit, InvalidRow as `plan` does.
        """
        from ltx_batch.model.given import given_conditions, given_text
        from ltx_batch.model.render import prepare_conditions, prepare_input
        from ltx_batch.model.trace import trace_request

        # The text itself says nothing where its embedding is given, so it may be empty.
        plan = self.plan(request if prompt_embeds is None else replace(request, prompt="given"))
        if conditions is None:
            request = self._with_media(request)
            items = prepare_conditions(request, plan, self._preprocess)
        else:
            request = self._with_media(replace(request, conditions=()))
            items = given_conditions(conditions, plan)
        channels = self._pipeline.transformer.config.caption_channels
        return trace_request(
            self._pipeline,
            plan,
            request,
            prompt=given_text("prompt", prompt_embeds, prompt_attention_mask, channels),
            negative=given_text("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask, channels),
            conditions=items,
            media=prepare_input(request, plan, self._preprocess),
            noise=noise,
        )

    def close(self) -> None:
        self._pipeline.close()


def load_renderer(
    checkpoint: str,
    *,
    precision: str = "auto",
    device: str = "auto",
    pipeline_config: str | None = None,
    upsampler: str | None = None,
    text_encoder: str | None = None,
    text_precision: str = "auto",
    placement: str = "auto",
    attention: str = "auto",
    device_memory_gib: float | None = None,
    condition_preprocess: str | None = None,
    llm_int8_threshold: float = 0.0,
    skip_modules: Sequence[str] = (),
    hadamard_group: int | None = None,
    keep_blocks: int | None = None,
    torch_threads: int | None = None,
    options: Mapping[str, Any] | None = None,
    text: str = "inline",
    text_cache: str | Storage | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> LtxRenderer:
    """Load a checkpoint: the name `demo` or an official one, a folder or official single file, by path, URI or hub id.

    `pipeline_config` is a preset's name, or a path or URI of an official YAML file; without it the checkpoint folder's own
    holds, else the official base defaults. `text_encoder` and `upsampler` name what the checkpoint has not, or what takes
    the place of its own: see `find_sources`. A text encoder that is not named and cannot be had is missed when a text is
    first encoded, and never where embeddings are given. `condition_preprocess` is none or official; None: what `resolve_preprocess`
    says. `llm_int8_threshold`, `skip_modules`, `hadamard_group` and `keep_blocks` bend the precision: see `Precision`.
    `text_precision` is the text encoder's: see `text_policy`.
    `placement` is auto, resident, offload or sharded, `device_memory_gib` how much of each GPU may be used. `attention` is
    auto, native or sage: see `check_attention`. `torch_threads` pins torch's CPU threads, on which pixels hang; `options` are fsspec options for URIs.
    `text_cache` is a folder or URI of embeddings, which are read from it and, with `text` inline, added to it; with
    `text` precomputed no text encoder is ever loaded. `recipe` is a run's: files and a pipeline config that differ from what
    it says are refused, now and whenever one is loaded later. Raises CheckpointError, PrecisionError or JobError before any weight is loaded, where it can.
    """
    check_built(precision, placement, condition_preprocess)
    policy.resolve_name(text_precision, "cpu")
    check_attention(attention, precision, device)
    sources, config = _find(checkpoint, pipeline_config, text_encoder, upsampler, options)
    with read_ahead(sources.weights_here(with_text=text == "inline")):
        from ltx_batch.model.device import pick_device, use_threads
        from ltx_batch.model.load import load_pipeline
        from ltx_batch.model.text_cache import open_text_cache

    if torch_threads is not None:
        use_threads(torch_threads)
    place = pick_device(device)
    if recipe is not None and pipeline_config is not None:
        check_config(recipe, pipeline_config, config)
    stored = transformer_stored(sources.checkpoint, options)
    name, _ = resolve_precision(precision, place.type, config, checkpoint=sources.checkpoint, options=options)
    chosen = (policy.precision if stored is None else stored.policy)(
        name,
        place.type,
        threshold=llm_int8_threshold,
        skip=tuple(skip_modules),
        hadamard_group=hadamard_group,
        keep_blocks=keep_blocks,
    )
    check_attention(attention, chosen.name, place.type)
    cache = None
    if text_cache is not None:
        hashes = sources.text_hashes(options) if recipe is None else recipe["checkpoint"]["files"]
        identity = TextIdentity(encoder_fingerprint(hashes), embedding_precision(text_precision, chosen.dtype))
        cache = open_text_cache(text_cache, identity, options)
    weights, upscaler = sources.local_checkpoint(options), sources.local_upsampler(options)
    encoder = _local_text(sources, text_encoder, options) if text == "inline" else None
    pipeline = load_pipeline(
        weights,
        chosen,
        place,
        expected=Expected.of(recipe, sources, weights, encoder, upscaler),
        text=encoder,
        upsampler=upscaler,
        text_precision=text_precision,
        text_cache=cache,
        placement=placement,
        memory_gib=device_memory_gib,
        attention=attention,
    )
    pipeline.check(config)
    preprocess = resolve_preprocess(condition_preprocess, config if pipeline_config is not None else None)
    return LtxRenderer(pipeline, config, condition_preprocess=preprocess, options=options)


def load_planner(
    checkpoint: str, *, pipeline_config: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[[RenderRequest], Plan]:
    """What `LtxRenderer.plan` answers, without torch and without the weights: small files and headers are read.

    Raises CheckpointError and JobError as `load_renderer` does.
    """
    sources, config = _find(checkpoint, pipeline_config, None, None, options)
    return partial(plan_request, config=config, scheduler=sources.schedule(options))


def _find(
    checkpoint: str,
    pipeline_config: str | None,
    text_encoder: str | None,
    upsampler: str | None,
    options: Mapping[str, Any] | None,
) -> tuple[Sources, PipelineConfig]:
    return find_sources(
        resolve_checkpoint(checkpoint),
        pipeline_config=pipeline_config,
        text_encoder=None if text_encoder is None else resolve_checkpoint(text_encoder),
        upsampler=upsampler,
        options=options,
    )


def _local_text(sources: Sources, named: str | None, options: Mapping[str, Any] | None) -> Path | CheckpointError:
    """The text encoder's folder; where none is named and the official one cannot be had, what to say when it is missed."""
    try:
        return sources.local_text_encoder(options)
    except CheckpointError as error:
        if named is not None or sources.text_encoder is None:
            raise
        return error


def resolve_checkpoint(checkpoint: str) -> str:
    """`demo` as its packaged folder; all other names as they are. Raises CheckpointError."""
    if checkpoint not in PACKAGED_NAMES:
        return checkpoint
    packaged = PACKAGED / checkpoint
    if not packaged.is_dir():
        raise CheckpointError(f"the packaged checkpoint is missing at {packaged}; install ltx-batch again")
    return str(packaged)


def checkpoint_fingerprint(
    checkpoint: str,
    *,
    pipeline_config: str | None = None,
    text_encoder: str | None = None,
    upsampler: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`{"files": {name: sha256}}` of every file that changes the picture, wherever it comes from: the checkpoint's part of
    the recipe.

    The same weights in another place have the same fingerprint. Raises CheckpointError.
    """
    sources, _ = _find(checkpoint, pipeline_config, text_encoder, upsampler, options)
    return {"files": sources.hashes(options)}


def pinned(model: ModelSpec, options: Mapping[str, Any] | None = None) -> ModelSpec:
    """The model with hub names as name@commit, official and unnamed ones too, so that whoever loads it loads that commit;
    all other names as they are. Raises CheckpointError and JobError."""
    if model.renderer == "fake":
        return model
    found, _ = _find(model.checkpoint or "", model.pipeline_config, model.text_encoder, model.upsampler, options)
    names = asdict(found.pinned())
    return model.model_copy(update={name: now for name, now in names.items() if now != getattr(found, name)})


def local_text_encoder(
    model: ModelSpec, recipe: Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> tuple[Path, Expected]:
    """The folder with the job's text_encoder/ and tokenizer/, brought to this machine, and what the recipe says of them.
    Raises CheckpointError."""
    sources, _ = _find(model.checkpoint or "", model.pipeline_config, model.text_encoder, model.upsampler, options)
    folder = sources.local_text_encoder(options)
    return folder, Expected.of(recipe, sources, folder, folder, None)


def layers_of(model: ModelSpec, options: Mapping[str, Any] | None = None) -> Shapes | None:
    """The linear layers of the transformer, which LoRA files must fit; None where the checkpoint is not at hand."""
    if not model.checkpoint or model.renderer == "fake":
        return None
    return transformer_layers(resolve_checkpoint(model.checkpoint), options)


def check_built(precision: str, placement: str, condition_preprocess: str | None) -> None:
    """Raises JobError or PrecisionError for a value that has a name but no code yet, before anything is started."""
    policy.resolve_name(precision, "cpu")
    check_name(placement)
    if condition_preprocess not in (None, "none", "official"):
        raise JobError(f"unknown condition_preprocess {condition_preprocess!r}; what works: none, official")


def check_job(job: JobSpec) -> None:
    """`check_built` and `check_attention` of a job's values."""
    check_built(job.model.precision, job.model.placement, job.condition_preprocess)
    if job.model.renderer == "ltx":
        check_attention(job.model.attention, job.model.precision, job.model.device)


def resolve_preprocess(asked: str | None, named: PipelineConfig | None) -> str:
    """What is asked for; else official where an official config is named (they all have a `checkpoint_path`), whose users
    expect the official picture, and none with anything else."""
    return asked or ("official" if named is not None and named.checkpoint_path else "none")


def resolve_precision(
    name: str,
    device: str,
    config: PipelineConfig | None = None,
    *,
    checkpoint: str | None = None,
    tokens: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> policy.Resolved:
    """`auto` as a real name: what the checkpoint is quantised as; else fp32 on a CPU, and on a GPU what is fastest there for
    its transformer and so many tokens. What cannot be timed here is what the pipeline config asks for, else bf16.

    `device` is cpu, cuda or auto. Raises PrecisionError.
    """
    if name != "auto":
        return policy.Resolved(policy.resolve_name(name, device), "asked for by name")
    stored = None if checkpoint is None else transformer_stored(checkpoint, options)
    if stored is not None:
        return policy.Resolved(stored.name, "the checkpoint is quantised so")
    if device == "auto":
        from ltx_batch.model.device import pick_device

        device = pick_device(device).type
    if device == "cpu":
        return policy.Resolved(policy.resolve_name(name, device), "on a CPU nothing is faster")
    timed = None if checkpoint is None else _fastest(checkpoint, tokens, options)
    asked = config.resolve_precision() if config is not None else None
    if timed is None and asked is not None:
        return policy.Resolved(asked, "nothing could be timed here, and the pipeline config asks for it")
    return timed or policy.Resolved(policy.resolve_name(name, device), "nothing could be timed here")


def _fastest(checkpoint: str, tokens: int | None, options: Mapping[str, Any] | None) -> policy.Resolved | None:
    """The precision in which this GPU is fastest; None without a GPU, or a checkpoint at hand."""
    from ltx_batch.model.quantize.probe import best_precision_here

    layers = transformer_layers(checkpoint, options) or {}
    first = layers.get(f"{policy.BLOCKS}.0.attn1.to_q")
    return None if first is None else best_precision_here(first[1], tokens)
