"""A loaded model made what a policy says: what the pipeline calls."""

from __future__ import annotations

from typing import Any

import torch

from ltx_batch.model.quantize.block import fuse_blocks
from ltx_batch.model.quantize.policy import Precision
from ltx_batch.model.quantize.swap import quantize_convolutions, quantize_model


def apply_policy(transformer: Any, vae: Any, policy: Precision, device: torch.device) -> dict[str, Any]:
    """Quantise in place, on `device`; returns what a record says of it. Raises PrecisionError.

    int8 also puts fused blocks in the place of the transformer's, int8-weight quantises the VAE's convolutions too.
    """
    found = quantize_model(transformer, policy, device)
    if policy.quantize == "int8":
        found["fused_blocks"] = fuse_blocks(transformer)
    if policy.quantize == "int8-weight":
        found["vae"] = quantize_convolutions(vae, device)
    return found
