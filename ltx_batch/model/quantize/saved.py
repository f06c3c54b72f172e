"""Quantised models to files and back: the bytes that were computed with, and no other copy of a layer at any time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ltx_batch.errors import CheckpointError
from ltx_batch.model.quantize import bnb
from ltx_batch.model.quantize.fp8 import Fp8Linear
from ltx_batch.model.quantize.hadamard import fitting_group
from ltx_batch.model.quantize.linear import Int8Linear
from ltx_batch.model.quantize.policy import Precision
from ltx_batch.model.quantize.stored import BNB_SCALE, Stored
from ltx_batch.model.quantize.weight_only import Int8WeightLinear

WEIGHTS = "diffusion_pytorch_model.safetensors"
_SCALE = ".weight_scale"


def put_blanks(model: nn.Module, names: Iterable[str], stored: Stored, source: str) -> None:
    """In a model on the meta device, put quantised layers where the files with tensors of these `names` have them.

    Raises CheckpointError where the files have what no such layer holds.
    """
    ending = BNB_SCALE if stored.name == "bnb-int8" else _SCALE
    for name in [name.removesuffix(ending) for name in names if name.endswith(ending)]:
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            layer = None
        if not isinstance(layer, nn.Linear):
            raise CheckpointError(f"{source} has a quantised {name}, and the model no linear layer of that name")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _blank(layer, stored, source))


def finish_bitsandbytes(model: nn.Module, threshold: float, device: torch.device) -> None:
    """Make bitsandbytes' layers of what was read of them, on `device`."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.StoredLinear8bit):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.restored(threshold, device))


def save_model(
    model: Any,
    config: Mapping[str, Any],
    policy: Precision,
    folder: Path,
    source: Mapping[str, str],
    *,
    weights: str = WEIGHTS,
) -> None:
    """Write config.json and `weights` of a quantised model to `folder`; `source` is {file: sha256} of what it was made from.

    bitsandbytes' layers are written as diffusers does, which reads them too. Of tied weights the first name is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = model.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in reversed(held.items())}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in held.items() if names[id(tensor)] == name}
    for name, layer in model.named_modules():
        if bnb.is_quantized(layer):
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in bnb.saved(layer).items()}
    write_tensors(tensors, folder / weights, Stored.of(policy, source).metadata())
    if policy.quantize == "bnb-int8":
        config = {**config, "quantization_config": _for_diffusers(model, policy)}
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")


def _for_diffusers(model: nn.Module, policy: Precision) -> dict[str, Any]:
    """What its loader must know: without it, it would take the codes for weights. All other linear layers are named, since
    it takes every linear layer for one of bitsandbytes'."""
    plain = [
        name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and not bnb.is_quantized(layer)
    ]
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_threshold": policy.threshold,
        "llm_int8_skip_modules": plain,
    }


def write_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A .safetensors file that others may read: the library itself keeps it to its owner."""
    save_file(dict(tensors), path, metadata)
    path.chmod(0o644)


def _blank(layer: nn.Linear, stored: Stored, source: str) -> nn.Module:
    sizes = (layer.in_features, layer.out_features)
    bias, dtype = layer.bias is not None, layer.weight.dtype
    match stored.name:
        case "int8":
            group = fitting_group(stored.hadamard_group, layer.in_features)
            return Int8Linear(*sizes, bias=bias, dtype=dtype, hadamard_group=group)
        case "int8-weight":
            return Int8WeightLinear(*sizes, bias=bias, dtype=dtype)
        case "fp8":
            return Fp8Linear(*sizes, bias=bias, dtype=dtype)
        case "bnb-int8":
            return bnb.StoredLinear8bit(*sizes, bias=bias, dtype=dtype)
    raise CheckpointError(f"{source} is quantised as {stored.name}, which this version does not know")
