"""A LoRA file: which layers it changes, by which tensors, and whether it fits a model. Only the header is read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ltx_batch.errors import CheckpointError, LoraError, StorageRefused
from ltx_batch.lora.names import diffusers_name
from ltx_batch.lora.scale import ScaleRule
from ltx_batch.storage import FileRef, exists_uri
from ltx_batch.tensor_file import TensorFile, parse_header, read_tensor_file

Shapes = Mapping[str, tuple[int, int]]  # linear layers by diffusers' names: out_features, in_features

# The end of a tensor's name says what it is: PEFT's and diffusers' lora_A and lora_B (with the adapter's name where
# PEFT's own state was saved), kohya's and ComfyUI's lora_down and lora_up, old diffusers' lora.down and lora.up.
_ROLES = (
    (re.compile(r"\.(lora_A(\.default)?|lora_down|lora\.down)\.weight$"), "down"),
    (re.compile(r"\.(lora_B(\.default)?|lora_up|lora\.up)\.weight$"), "up"),
    (re.compile(r"\.alpha$"), "alpha"),
)
_TEXT_ENCODER = re.compile(r"^(text_encoders?\w*|text_model|cond_stage_model|te\d?)\.|^lora_te")
# Kinds of adapters that are more than B @ A.
_OTHER_KINDS = {
    "DoRA": re.compile(r"dora_scale|lora_magnitude_vector"),
    "LoKr or LoHa": re.compile(r"\.(lokr|hada)_"),
    "LoRA with biases": re.compile(r"\.lora_(B|up)(\.default)?\.bias$"),
}
# In-context LoRAs see a reference video beside the clip; the newer ones say so, the official 0.9.7 ones by their name.
_IC_NAME = re.compile(r"(?<![a-z])ic[-_]?lora", re.IGNORECASE)
_IC_METADATA = "reference_"
_FLOATS = ("F32", "F16", "BF16", "F64")
_LINEAR = re.compile(r"^(?!vae\.).*\.weight$")  # an official file holds the VAE too
_EXPECTED = (
    "a LoRA file is safetensors with pairs such as transformer.transformer_blocks.0.attn1.to_q.lora_A.weight and "
    "...lora_B.weight, or diffusion_model....lora_down.weight and ...lora_up.weight"
)


@dataclass(frozen=True, slots=True)
class LoraLayer:
    """One layer's update, scale * up @ down, by the names of its tensors in the file.

    down is [rank, in_features], up [out_features, rank]. Where `alpha` names a tensor, the scale is its value / rank,
    else `scale`.
    """

    down: str
    up: str
    alpha: str | None
    rank: int
    in_features: int
    out_features: int
    scale: float


@dataclass(frozen=True, slots=True)
class LoraFile:
    """What a file does, by diffusers' names of the layers."""

    source: str
    layers: Mapping[str, LoraLayer]

    def misfits(self, shapes: Shapes) -> list[str]:
        """Why the file does not fit a model with these linear layers; empty where it fits."""
        absent = [name for name in self.layers if name not in shapes]
        other = [
            f"{name} is {layer.in_features} to {layer.out_features} in the file and {shapes[name][1]} to "
            f"{shapes[name][0]} in the model"
            for name, layer in self.layers.items()
            if name in shapes and (layer.out_features, layer.in_features) != shapes[name]
        ]
        faults = []
        if absent:
            faults.append(
                f"{len(absent)} of its {len(self.layers)} layers are no linear layers of this transformer: "
                f"{some(absent)}; it has e.g. {some(shapes)}"
            )
        if other:
            faults.append(f"{len(other)} of its {len(self.layers)} layers have another size: {some(other)}")
        return faults


def open_lora(uri: str, options: Mapping[str, Any] | None = None) -> LoraFile:
    """Read the header of a file anywhere. Raises LoraError for one that is missing, unreadable, torn or no LoRA."""
    try:
        if not exists_uri(uri, options):
            raise ValueError(f"there is no file {uri}")
        return _read(read_tensor_file(uri, options))
    except (CheckpointError, StorageRefused, ValueError) as error:
        raise LoraError(str(error)) from None
    except OSError as error:
        raise LoraError(f"{uri} cannot be read: {error}") from error


def parse_lora_file(data: bytes, source: str) -> LoraFile:
    """The same of a file in memory; `source` is what messages call it."""
    text = data[8 : 8 + int.from_bytes(data[:8], "little")]
    try:
        return _read(parse_header(text, FileRef(source, len(data), "")))
    except (CheckpointError, ValueError) as error:
        raise LoraError(str(error)) from None


def shapes_in(header: TensorFile) -> dict[str, tuple[int, int]]:
    """The linear layers of a transformer's weights file, diffusers' or the official single one."""
    linear = {name: entry.shape for name, entry in header.tensors.items() if _LINEAR.search(name)}
    return {
        diffusers_name(name.removesuffix(".weight")): (shape[0], shape[1])
        for name, shape in linear.items()
        if len(shape) == 2
    }


def some(names: Iterable[str], shown: int = 3) -> str:
    """The first few names, and how many there are beyond."""
    listed = list(names)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


def _read(header: TensorFile) -> LoraFile:
    """Raises ValueError with every fault."""
    groups, foreign = _group(header)
    faults = _kinds(header) or _foreign(groups, foreign) or _faults(groups, header)
    if faults:
        raise ValueError(f"{header.source}: {'; '.join(faults)}")
    rule = ScaleRule.parse(header.metadata, header.source)
    return LoraFile(header.source, {name: _layer(name, parts, header, rule) for name, parts in groups.items()})


def _group(header: TensorFile) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Tensor names by layer and role, and those without a role of their own."""
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    foreign: list[str] = []
    for name in header.tensors:
        pattern, role = next(((pattern, role) for pattern, role in _ROLES if pattern.search(name)), (None, ""))
        if pattern is None or groups[diffusers_name(pattern.sub("", name))].setdefault(role, name) != name:
            foreign.append(name)
    return groups, foreign


def _kinds(header: TensorFile) -> list[str]:
    """Adapters that another part of a model, or another mechanism, would need."""
    faults = []
    texts = [name for name in header.tensors if _TEXT_ENCODER.search(name)]
    if texts:
        faults.append(f"it holds a LoRA for a text encoder, and only the transformer takes one: {some(texts)}")
    for kind, pattern in _OTHER_KINDS.items():
        if names := [name for name in header.tensors if pattern.search(name)]:
            faults.append(f"it is a {kind}, of which only plain LoRA is built: {some(names)}")
    marks = [name for name in header.metadata if name.startswith(_IC_METADATA)]
    if marks or _IC_NAME.search(header.source.rpartition("/")[2]):
        why = f"metadata {some(marks)}" if marks else "going by its name; rename it if it is none"
        faults.append(f"it is an in-context LoRA ({why}), which needs a reference video; that is not built")
    if any(name.startswith("base_model.") for name in header.tensors):
        faults.append(
            "it was saved by PEFT itself, with alpha in another file: save it by diffusers' save_lora_weights"
        )
    return faults


def _foreign(groups: Mapping[str, Mapping[str, str]], foreign: list[str]) -> list[str]:
    if not groups:
        return [f"is no LoRA: it holds {some(foreign) or 'no tensors'}; {_EXPECTED}"]
    return [f"has tensors that belong to no pair, or to one that is there already: {some(foreign)}"] if foreign else []


def _faults(groups: Mapping[str, Mapping[str, str]], header: TensorFile) -> list[str]:
    """Layers whose tensors are not a pair of matrices of one rank."""
    halves = [name for name, parts in groups.items() if not {"down", "up"} <= parts.keys()]
    pairs = {name: parts for name, parts in groups.items() if name not in halves}
    wrong = [
        f"{name} has {list(down.shape)} and {list(up.shape)}"
        for name, parts in pairs.items()
        if not _are_pair(down := header.tensors[parts["down"]], up := header.tensors[parts["up"]])
    ]
    alphas = [
        parts["alpha"]
        for parts in pairs.values()
        if "alpha" in parts and header.tensors[parts["alpha"]].shape not in ((), (1,))
    ]
    types = [name for parts in groups.values() for name in parts.values() if header.tensors[name].dtype not in _FLOATS]
    return [
        f"{what}: {some(names)}"
        for what, names in (
            ("layers with only one of the two matrices", halves),
            ("layers whose matrices are not [rank, in] and [out, rank]", wrong),
            ("alphas that are not one number", alphas),
            (f"tensors that are none of {', '.join(_FLOATS)}", types),
        )
        if names
    ]


def _are_pair(down: Any, up: Any) -> bool:
    return len(down.shape) == len(up.shape) == 2 and down.shape[0] == up.shape[1] > 0


def _layer(name: str, parts: Mapping[str, str], header: TensorFile, rule: ScaleRule) -> LoraLayer:
    rank, in_features = header.tensors[parts["down"]].shape
    out_features = header.tensors[parts["up"]].shape[0]
    return LoraLayer(
        parts["down"], parts["up"], parts.get("alpha"), rank, in_features, out_features, rule.scale(name, rank)
    )
