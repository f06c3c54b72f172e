"""A loaded model made what a policy says: what the pipeline calls."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ltx_batch.model.quantize.block import fuse_blocks
from ltx_batch.model.quantize.policy import Precision
from ltx_batch.model.quantize.saved import finish_bitsandbytes
from ltx_batch.model.quantize.stored import Stored
from ltx_batch.model.quantize.swap import check_device, is_quantized, quantize_convolutions, quantize_model, told

log = logging.getLogger(__name__)


def apply_policy(
    transformer: Any,
    vae: Any,
    policy: Precision,
    device: torch.device,
    *,
    home: torch.device | None = None,
    stored: Stored | None = None,
) -> dict[str, Any]:
    """Quantise in place, on `device`, which computes with it; layers then lie in `home`, by default there too. Returns
    what a record says of it. Raises PrecisionError.

    A transformer that came quantised, as `stored` says, is taken as it is. int8 also puts fused blocks in the place of
    the transformer's, int8-weight quantises the VAE's convolutions too.
    """
    home = home or device
    if stored is None:
        found = quantize_model(transformer, policy, device, home=home)
    else:
        found = _take(transformer, policy, device, home)
    if found:
        log.info("%s: %s", policy.name, ", ".join(f"{name} {value}" for name, value in found.items()))
    if policy.quantize == "int8":
        found["fused_blocks"] = fuse_blocks(transformer)
    if policy.quantize == "int8-weight":
        found["vae"] = quantize_convolutions(vae, device, home)
    return found


def _take(transformer: nn.Module, policy: Precision, device: torch.device, home: torch.device) -> dict[str, Any]:
    check_device(policy, device)
    finish_bitsandbytes(transformer, policy.threshold, home)
    table = {
        name: policy.quantize or "" if is_quantized(layer) else policy.dtype
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) or is_quantized(layer)
    }
    return {**told(policy, table), "prequantized": True}
