"""bnb-int8: linear layers of the transformer's blocks as bitsandbytes' `Linear8bitLt` (LLM.int8(), arXiv 2208.07339).

Built by hand and not through diffusers' quantisation config, which needs a GPU even to load.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

# It computes in fp16 whatever the model holds, and says so at every other call.
warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")


def quantized(layer: nn.Linear, threshold: float, device: torch.device) -> nn.Module:
    """`layer` with int8 weights, on `device`; bitsandbytes rounds them on the way there."""
    import bitsandbytes

    made = _blank(layer.in_features, layer.out_features, layer.bias is not None, threshold)
    made.weight = bitsandbytes.nn.Int8Params(layer.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return made.to(device)


def restored(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, threshold: float, device: torch.device
) -> nn.Module:
    """The layer of a bitsandbytes checkpoint: `weight` int8 [out, in], `scale` (there called SCB) fp32 [out]."""
    import bitsandbytes

    made = _blank(weight.shape[1], weight.shape[0], bias is not None, threshold)
    made.weight = bitsandbytes.nn.Int8Params(weight.to(device), requires_grad=False, has_fp16_weights=False)
    made.weight.SCB = scale.to(device)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(device), requires_grad=False)
    return made


def is_quantized(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Linear8bitLt"  # without importing bitsandbytes


def scales(module: nn.Module) -> list[torch.Tensor]:
    """The row scales, which bitsandbytes keeps beside the parameters and in no buffer."""
    return [scale_of(layer) for layer in module.modules() if is_quantized(layer)]


def scale_of(layer: Any) -> torch.Tensor:
    """fp32 [out]; the first forward moves it from the weight to the layer's state."""
    scale: torch.Tensor = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return scale


def _blank(in_features: int, out_features: int, bias: bool, threshold: float) -> Any:
    import bitsandbytes

    return bitsandbytes.nn.Linear8bitLt(
        in_features, out_features, bias=bias, has_fp16_weights=False, threshold=threshold, device="meta"
    )
