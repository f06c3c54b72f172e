"""A checkpoint to a folder whose transformer is quantised: written once, and then loaded by everybody as it is."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ltx_batch.errors import CheckpointError, PrecisionError
from ltx_batch.model.checkpoint import TextParts, build
from ltx_batch.model.fetch import SCHEDULER_FILE
from ltx_batch.model.part import KINDS, Part, Parts
from ltx_batch.model.parts import open_checkpoint
from ltx_batch.model.quantize.policy import Precision
from ltx_batch.model.quantize.saved import WEIGHTS, save_model, write_tensors
from ltx_batch.model.quantize.swap import quantize_model
from ltx_batch.model.streaming import fill

_CPU = torch.device("cpu")
_TEXT_WEIGHTS = "model.safetensors"  # as transformers names them
_DTYPES = {"F32": torch.float32, "F16": torch.float16}  # everything else becomes bf16


def convert_checkpoint(
    place: Path,
    folder: Path,
    policy: Precision,
    source: Mapping[str, str],
    device: torch.device,
    *,
    upsampler: Path | None = None,
    text: TextParts | None = None,
    text_source: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write `folder`, in diffusers' layout, from the checkpoint at `place`, a folder or an official single file.

    The transformer is quantised on `device`, a layer at a time; other parts are the checkpoint's own, their weights linked
    where the disk allows it. With `text`, which is to be quantised, that text encoder is written too, beside its tokenizer, in bf16 where it
    is not. `source` and `text_source` are {file: sha256} of what they are made from. Returns counts and bytes. Raises CheckpointError where there is
    something at `folder`, PrecisionError where there is nothing to quantise or it has been done.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is there already; name a folder that is not")
    if policy.quantize is None:
        raise PrecisionError(f"{policy.name} quantises nothing; choose int8, int8-weight, fp8 or bnb-int8")
    parts = open_checkpoint(place, upsampler=upsampler)
    if parts.transformer.stored is not None:
        raise PrecisionError(f"{place} is quantised already, as {parts.transformer.stored.name}: name the original")
    if text is not None:
        _check_text(text)
    told = _write_transformer(parts, folder / "transformer", policy, source, device)
    made = ["transformer"]
    if text is not None:
        told |= _write_text(text, folder, text_source)
        made += ["text_encoder", "tokenizer"]
    if place.is_dir():
        _link_all(place, folder, but=made)
    else:
        _write_others(parts, folder)
    return told


def _check_text(text: TextParts) -> None:
    if text.part.stored is not None:
        raise PrecisionError(f"{text.part.source} is quantised already, as {text.part.stored.name}: leave it as it is")
    if text.policy.quantize is None:
        raise PrecisionError(f"{text.precision} quantises no text encoder; choose int8, int8-weight, fp8 or bnb-int8")


def _write_text(text: TextParts, folder: Path, source: Mapping[str, str]) -> dict[str, Any]:
    config = {**text.part.config, "architectures": [KINDS["text_encoder"]]}
    save_model(text.load(_CPU), config, text.policy, folder / "text_encoder", source, weights=_TEXT_WEIGHTS)
    shutil.copytree(text.folder / "tokenizer", folder / "tokenizer", copy_function=_link)
    return {"text_precision": text.precision, "text_bytes": (folder / "text_encoder" / _TEXT_WEIGHTS).stat().st_size}


def _write_transformer(
    parts: Parts, folder: Path, policy: Precision, source: Mapping[str, str], device: torch.device
) -> dict[str, Any]:
    part = parts.transformer
    model = _load("transformer", part)
    told = quantize_model(model, policy, device)
    positions = {"causal_positions": parts.causal_positions, "timestep_scale": parts.timestep_scale}
    save_model(model, part.written("transformer", **positions), policy, folder, source)
    numbers = sum(prod(tensor.shape) for tensor in part.tensors.values())
    written = (folder / WEIGHTS).stat().st_size
    return {**told, "transformer_bytes": written, "bf16_bytes": 2 * numbers, "share": round(written / (2 * numbers), 4)}


def _write_others(parts: Parts, folder: Path) -> None:
    """What a single file holds beside the transformer."""
    others = {"vae": parts.vae, "latent_upsampler": parts.latent_upsampler}
    for name, part in others.items():
        if part is not None:
            (folder / name).mkdir(parents=True)
            model = _load(name, part)
            tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
            write_tensors(tensors, folder / name / WEIGHTS, {"format": "pt"})
            _write_json(folder / name / "config.json", part.written(name))
    (folder / SCHEDULER_FILE).parent.mkdir()
    told = {key: value for key, value in asdict(parts.scheduler).items() if value is not None}
    _write_json(folder / SCHEDULER_FILE, {"_class_name": "FlowMatchEulerDiscreteScheduler", **told})


def _load(name: str, part: Part) -> Any:
    """In the numbers that most of its weights are stored in."""
    kinds = Counter(tensor.dtype for tensor in part.tensors.values())
    model = build(name, part)
    fill(model, part.tensors, _DTYPES.get(kinds.most_common(1)[0][0], torch.bfloat16), _CPU)
    return model


def _link_all(place: Path, folder: Path, *, but: Sequence[str]) -> None:
    """Everything else, without a second copy of weights where both lie on one disk."""
    for entry in place.iterdir():
        if entry.is_dir() and entry.name not in but:
            shutil.copytree(entry, folder / entry.name, copy_function=_link)
        elif entry.is_file():
            _link(str(entry), str(folder / entry.name))


def _link(source: str, target: str) -> str:
    if source.endswith(".safetensors"):  # what people edit, as configs, would change the original too
        with suppress(OSError):
            os.link(Path(source).resolve(), target)  # a model hub's cache has links to blobs
            return target
    return shutil.copy2(source, target)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")
