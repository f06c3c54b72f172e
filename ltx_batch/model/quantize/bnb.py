"""bnb-int8: linear layers of the transformer's blocks as bitsandbytes' `Linear8bitLt` (LLM.int8(), arXiv 2208.07339).

Built by hand and not through diffusers' quantisation config, which needs a GPU even to load.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ltx_batch.errors import PrecisionError
from ltx_batch.model.quantize.policy import Precision, matches

# It computes in fp16 whatever the model holds, and says so at every other call.
warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")

# proj_in, proj_out, time_embed and caption_projection lie outside the blocks and stay: 1 % of the weights, and every
# published recipe keeps them.
BLOCKS = "transformer_blocks"


def quantize_blocks(transformer: nn.Module, policy: Precision, device: torch.device) -> dict[str, Any]:
    """Swap the blocks' linear layers in place, each quantised on its way to `device`.

    Returns what happened: counts of quantised and skipped layers. Raises PrecisionError where nothing is quantised, or
    a skip pattern matches no layer.
    """
    layers = {
        name: layer
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and name.startswith(BLOCKS)
    }
    for pattern in policy.skip:
        if not any(matches(name, pattern) for name in layers):
            raise PrecisionError(
                f"skip_modules: {pattern} matches no linear layer of the blocks; there are e.g. {', '.join(list(layers)[:10])}"
            )
    chosen = [name for name in layers if not policy.keeps(name)]
    if not chosen:
        raise PrecisionError(
            f"{policy.name} would quantise nothing: {len(layers)} linear layers in the blocks, all skipped"
        )
    for name in chosen:
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, _quantized(layers[name], policy.threshold, device))
    return {
        "quantized_layers": len(chosen),
        "skipped_layers": len(layers) - len(chosen),
        "llm_int8_threshold": policy.threshold,
    }


def scale_bytes(module: nn.Module) -> int:
    """Bytes of the row scales, which bitsandbytes keeps beside the parameters and in no buffer."""
    found = 0
    for layer in module.modules():
        if type(layer).__name__ == "Linear8bitLt":
            held: Any = layer  # the first forward moves the scales from the weight to the layer's state
            scales = held.state.SCB if held.weight.SCB is None else held.weight.SCB
            found += scales.numel() * scales.element_size()
    return found


def _quantized(layer: nn.Linear, threshold: float, device: torch.device) -> nn.Module:
    import bitsandbytes

    made: nn.Module = bitsandbytes.nn.Linear8bitLt(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        has_fp16_weights=False,
        threshold=threshold,
        device="meta",
    )
    made.weight = bitsandbytes.nn.Int8Params(layer.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return made.to(device)
