"""The models of a checkpoint before they are built: what each is told, and where its weights lie. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ltx_batch.errors import CheckpointError
from ltx_batch.model.quantize.stored import Stored, stored_form
from ltx_batch.model.sigmas import SchedulerConfig
from ltx_batch.tensor_file import StoredTensor, read_tensor_file

KINDS = {
    "transformer": "LTXVideoTransformer3DModel",
    "vae": "AutoencoderKLLTXVideo",
    "text_encoder": "T5EncoderModel",
    "latent_upsampler": "LTXLatentUpsamplerModel",
}
OWN_KEY = "_ltx_batch"  # in a config.json of our own making: what diffusers' configuration cannot say
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")


@dataclass(frozen=True, slots=True)
class Part:
    """One model: the configuration of diffusers' class, and its tensors by that class's names.

    `attributes` are set on the built model by their paths, and modules in `unused` taken out of it: what the official
    model has and the configuration cannot say. `padding_mode` is of the convolutions. `stored` says how the weights are
    quantised already.
    """

    source: str
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros"
    stored: Stored | None = None

    def written(self, name: str, **more: Any) -> dict[str, Any]:
        """The config.json that `read_component` reads this part of; `more` stands beside what only we understand."""
        own = {
            "attributes": dict(self.attributes),
            "unused": list(self.unused),
            "padding_mode": self.padding_mode,
            **more,
        }
        return {**self.config, "_class_name": KINDS[name], OWN_KEY: own}


@dataclass(frozen=True, slots=True)
class Parts:
    """What renders, without the text encoder, which may come from elsewhere.

    `causal_positions`: the first latent frame, which holds one frame of the clip, also counts as one in the positions
    that the transformer sees (since 0.9.5). The transformer's timestep is sigma times `timestep_scale`.
    """

    transformer: Part
    vae: Part
    scheduler: SchedulerConfig
    causal_positions: bool = True
    timestep_scale: float = 1000.0
    latent_upsampler: Part | None = None


def read_component(folder: Path, name: str) -> Part:
    """A model in diffusers' or transformers' folder layout: config.json beside weights, in shards or not.

    Raises CheckpointError where the folder holds another model, none, or a torn one.
    """
    config = read_json(folder / "config.json")
    kinds = [config.get("_class_name"), *config.get("architectures", [])]
    if KINDS[name] not in kinds:
        kind = next((kind for kind in kinds if kind), "no class name")
        raise CheckpointError(f"{folder} is not a {KINDS[name]}: its config.json says {kind}")
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, str] = {}
    for file in map(read_tensor_file, _weight_files(folder)):
        tensors, metadata = {**tensors, **file.tensors}, {**metadata, **file.metadata}
    if name == "text_encoder":  # T5's decoder, which some folders hold too, is never used
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(("shared.", "encoder."))}
    own = config.pop(OWN_KEY, {})
    return Part(
        str(folder),
        config,
        tensors,
        attributes=own.get("attributes", {}),
        unused=tuple(own.get("unused", ())),
        padding_mode=own.get("padding_mode", "zeros"),
        stored=stored_form(tensors, metadata, str(folder)),
    )


def _weight_files(folder: Path) -> list[Path]:
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = _shards(index)
            absent = [shard for shard in shards if not (folder / shard).is_file()]
            if absent or not shards:
                raise CheckpointError(f"{folder} lacks {', '.join(absent) or 'shards'}, which {index.name} names")
            return [folder / shard for shard in shards]
        if (folder / name).is_file():
            return [folder / name]
    found = sorted(file for file in folder.glob("*.safetensors") if _is_hashed(file.name))
    if len(found) != 1:
        what = "no *.safetensors" if not found else f"several *.safetensors and none called {' or '.join(_WEIGHTS)}"
        raise CheckpointError(f"{folder} has {what}; it holds {held(folder)}. Pickled weights (.bin) are not read")
    return found


def _shards(index: Path) -> list[str]:
    """The files that the index names. Raises CheckpointError for a name that no recipe would have the hash of."""
    entries = read_json(index).get("weight_map", {})
    for tensor, shard in entries.items() if isinstance(entries, dict) else [("weight_map", None)]:
        if not isinstance(shard, str) or not _is_hashed(shard):
            raise CheckpointError(
                f"{index}: {tensor} is said to lie in {shard!r}; a shard must be a .safetensors file beside the index, whose name "
                "has no / or \\ in it and begins with neither . nor _"
            )
    return sorted(set(entries.values()))


def _is_hashed(name: str) -> bool:
    """Whether a folder's listing, by which files get into a recipe, has a file of weights by this name."""
    return not any(mark in name for mark in "/\\") and name.endswith(".safetensors") and not name.startswith((".", "_"))


def read_json(path: Path) -> dict[str, Any]:
    """Raises CheckpointError where there is no such file or it holds no JSON object."""
    try:
        data = json.loads(read_file(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return data


def read_file(path: Path) -> bytes:
    """Raises CheckpointError where there is no such file."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder holds {held(path.parent)}") from None


def held(folder: Path) -> str:
    """What a message shows of a folder."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names) or "nothing"
