"""The linear layers of a model swapped for quantised ones, as a policy says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ltx_batch.errors import PrecisionError
from ltx_batch.model.quantize import bnb, fp8
from ltx_batch.model.quantize.fp8 import Fp8Linear
from ltx_batch.model.quantize.linear import Int8Linear
from ltx_batch.model.quantize.policy import BLOCKS, Precision
from ltx_batch.model.quantize.weight_only import Int8WeightConv3d, Int8WeightLinear


def quantize_model(
    model: nn.Module,
    policy: Precision,
    device: torch.device,
    *,
    home: torch.device | None = None,
    blocks: str = BLOCKS,
) -> dict[str, Any]:
    """Swap linear layers in place, each quantised on `device` and then put in `home`, by default left there; the rest of
    the model stays where it is. Rounded on another kind of device the last bits of weights may differ, and pixels with
    them: what computes is what rounds, wherever the model lies.

    Returns what a record says of it: counts of layers and bytes, empty where the policy quantises nothing. `blocks` is
    the dotted name of the model's list of blocks. Raises PrecisionError where nothing would be quantised, the model is
    quantised already, or the device cannot do it.
    """
    if policy.quantize is None:
        return {}
    check_device(policy, device)
    check_plain(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    table = policy.table(layers, blocks=blocks)
    before_bytes = stored_bytes(model)
    for name, becomes in table.items():
        if becomes == policy.quantize:
            put(model, name, make_layer(layers[name], policy, device).to(home or device))
            del layers[name]  # so that never more than one layer is there twice
    return {**told(policy, table, blocks=blocks), "saved_bytes": before_bytes - stored_bytes(model)}


def quantize_convolutions(model: nn.Module, device: torch.device, home: torch.device | None = None) -> dict[str, Any]:
    """Swap the 3D convolutions of a VAE, as `quantize_model` does, for ones with int8 weights, which saves memory only.
    Returns counts."""
    check_plain(model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv3d)}
    before_bytes = stored_bytes(model)
    for name, layer in layers.items():
        put(model, name, Int8WeightConv3d.of(layer, device).to(home or device))
    return {"quantized_convolutions": len(layers), "saved_bytes": before_bytes - stored_bytes(model)}


def told(policy: Precision, table: Mapping[str, str], *, blocks: str = BLOCKS) -> dict[str, Any]:
    """What a record says of a model that became what `table` says."""
    chosen = sum(becomes == policy.quantize for becomes in table.values())
    skipped = sum(name.startswith(f"{blocks}.") for name in table) - chosen
    found: dict[str, Any] = {"quantized_layers": chosen, "skipped_layers": skipped}
    if policy.quantize == "bnb-int8":
        found["llm_int8_threshold"] = policy.threshold
    if policy.quantize == "int8":
        found["hadamard_group"] = policy.hadamard_group
    return found


def check_device(policy: Precision, device: torch.device) -> None:
    """Raises PrecisionError where `device` cannot compute what the policy asks for."""
    if policy.quantize == "fp8":
        fp8.check_device(device)
    if policy.quantize == "int8" and device.type == "cuda":
        if find_spec("triton") is None:
            raise PrecisionError("int8 takes Triton on a GPU: pip install triton; or use int8-weight")
        if torch.cuda.get_device_capability(device) < (8, 0):
            raise PrecisionError(
                f"int8 takes a GPU of compute capability 8.0 or newer; {torch.cuda.get_device_name(device)} is older: "
                "use int8-weight"
            )


def check_plain(model: nn.Module) -> None:
    """Raises PrecisionError where a layer is quantised: rounding it again would only add errors."""
    found = [name for name, layer in model.named_modules() if is_quantized(layer)]
    if found:
        raise PrecisionError(
            f"this model is quantised already ({len(found)} layers, e.g. {found[0]}); load the original weights to "
            "quantise them another way"
        )


def is_quantized(layer: nn.Module) -> bool:
    return isinstance(layer, (Int8Linear, Int8WeightLinear, Int8WeightConv3d, Fp8Linear)) or bnb.is_quantized(layer)


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of that dotted name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def stored_bytes(model: nn.Module, device: torch.device | None = None) -> int:
    """Bytes of weights and buffers; with a `device`, of those that lie on it."""
    held = [*model.parameters(), *model.buffers(), *bnb.scales(model)]
    return sum(t.numel() * t.element_size() for t in held if device is None or t.device.type == device.type)


def make_layer(layer: nn.Linear, policy: Precision, device: torch.device) -> nn.Module:
    """`layer` as the policy quantises it, on `device`."""
    makers: dict[str, Callable[[nn.Linear], nn.Module]] = {
        "int8": partial(Int8Linear.of, device=device, hadamard_group=policy.hadamard_group),
        "int8-weight": partial(Int8WeightLinear.of, device=device),
        "fp8": partial(Fp8Linear.of, device=device),
        "bnb-int8": partial(bnb.quantized, threshold=policy.threshold, device=device),
    }
    return makers[policy.quantize or ""](layer)
