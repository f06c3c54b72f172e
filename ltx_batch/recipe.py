"""What a job adds to a row's key, and the identity of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ltx_batch.errors import CheckpointError, LoraError
from ltx_batch.job import JobSpec
from ltx_batch.manifest import hash_loras, job_loras
from ltx_batch.model.expected import config_sha256
from ltx_batch.model.pipeline_config import PipelineConfig, load_pipeline_config
from ltx_batch.model.plan import latent_size, pad_frames, pad_size
from ltx_batch.model.quantize import policy
from ltx_batch.record import SCHEMA_VERSION
from ltx_batch.renderer import (
    checkpoint_fingerprint,
    resolve_checkpoint,
    resolve_precision,
    resolve_preprocess,
)
from ltx_batch.request import LoraRef, canonical, lora_set

# The precisions that each of these keys bends.
_QUANTIZED = ("int8", "int8-weight", "bnb-int8", "fp8")
_BENT = {
    "skip_modules": _QUANTIZED,
    "keep_blocks": _QUANTIZED,
    "hadamard_group": ("int8",),
    "llm_int8_threshold": ("bnb-int8",),
}


def make_recipe(job: JobSpec) -> dict[str, Any]:
    """The recipe with the precision as asked for; no GPU is needed, only the checkpoint's files."""
    model, named = job.model, named_config(job)
    recipe: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "precision": model.precision,
        "condition_preprocess": resolve_preprocess(job.condition_preprocess, named),
        "video": job.video.model_dump(),
    }
    if model.renderer == "fake":
        recipe["renderer"] = "fake"
    else:
        recipe["checkpoint"] = checkpoint_fingerprint(
            model.checkpoint or "",
            pipeline_config=model.pipeline_config,
            text_encoder=model.text_encoder,
            upsampler=model.upsampler,
            options=job.storage.options,
        )
    if named is not None:
        recipe["pipeline_config"] = config_sha256(named)
    if model.text_precision != "auto":
        recipe["text_precision"] = model.text_precision
    if model.attention != "auto":
        recipe["attention"] = model.attention
    if model.skip_modules:
        recipe["skip_modules"] = sorted(model.skip_modules)
    if model.hadamard_group not in (None, policy.DEFAULT_HADAMARD_GROUP):
        recipe["hadamard_group"] = model.hadamard_group
    if model.keep_blocks is not None:
        recipe["keep_blocks"] = model.keep_blocks
    if model.precision == "bnb-int8" or model.llm_int8_threshold:
        recipe["llm_int8_threshold"] = model.llm_int8_threshold
    return with_precision(recipe, model.precision)


def with_precision(recipe: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The recipe with the precision by that name, and without what bends only other ones: it changes no pixel of this one.
    `auto` keeps all, since it may become any of them."""
    idle = {key for key, bent in _BENT.items() if name not in (*bent, "auto")}
    return {**{key: value for key, value in recipe.items() if key not in idle}, "precision": name}


def job_precision(job: JobSpec) -> policy.Resolved:
    """The job's precision by its real name, on the device of this process; what is timed has the job's default size.

    Raises PrecisionError and JobError.
    """
    model, size = job.model, job.defaults
    checkpoint = resolve_checkpoint(model.checkpoint) if model.checkpoint and model.renderer == "ltx" else None
    padded = pad_frames(size.num_frames), pad_size(size.height), pad_size(size.width)
    return resolve_precision(
        model.precision,
        model.device,
        named_config(job),
        checkpoint=checkpoint,
        tokens=prod(latent_size(*padded)),
        options=job.storage.options,
    )


def named_config(job: JobSpec) -> PipelineConfig | None:
    """The pipeline config that the job names, if it does. Raises JobError."""
    named = job.model.pipeline_config
    return None if named is None else load_pipeline_config(named, options=job.storage.options)


def default_loras(job: JobSpec) -> tuple[LoraRef, ...]:
    """The LoRA files of rows that have none of their own, hashed. Not in the recipe: a row that names them is equal."""
    try:
        return lora_set(hash_loras(job_loras(job), job.storage.options))
    except LoraError as error:
        raise CheckpointError(f"model.loras: {error}") from error


def run_id(manifest: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], job: JobSpec) -> str:
    """16 hex digits that name a run: the manifest files' bytes, the recipe as asked for, and the job's row defaults.

    Where files lie is not in it: a copied manifest is the same run. `shard_rows` is, since shards are named by it.
    Raises CheckpointError where a LoRA file of the job cannot be hashed.
    """
    identity: dict[str, Any] = {
        "manifest": [[part["sha256"], part["rows"]] for part in manifest],
        "recipe": canonical(recipe),
        "defaults": canonical(job.defaults.model_dump()),
        "shard_rows": job.shard_rows,
    }
    if loras := default_loras(job):  # a row's default too, of which older jobs have none
        identity["loras"] = canonical(loras)
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
