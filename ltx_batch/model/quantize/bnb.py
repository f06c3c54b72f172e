"""bnb-int8: linear layers of the transformer's blocks as bitsandbytes' `Linear8bitLt` (LLM.int8(), arXiv 2208.07339).

Built by hand and not through diffusers' quantisation config, which needs a GPU even to load.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ltx_batch.errors import CheckpointError


def quantized(layer: nn.Linear, threshold: float, device: torch.device) -> nn.Module:
    """`layer` with int8 weights, on `device`; bitsandbytes rounds them on the way there."""
    import bitsandbytes

    made = _blank(layer.in_features, layer.out_features, layer.bias is not None, threshold)
    made.weight = bitsandbytes.nn.Int8Params(layer.weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return made.to(device)


class StoredLinear8bit(nn.Module):
    """What a checkpoint holds of such a layer, by bitsandbytes' names: `SCB` fp32 [out] is the largest of each row."""

    STORED: ClassVar = {"weight": torch.int8, "SCB": torch.float32, "weight_format": torch.uint8}

    def __init__(self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device="meta"))
        self.register_buffer("SCB", torch.empty(out_features, device="meta"))
        self.register_buffer("weight_format", torch.empty((), dtype=torch.uint8, device="meta"))
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device="meta") if bias else None)

    def restored(self, threshold: float, device: torch.device) -> nn.Module:
        """The layer that works, on `device`. Raises CheckpointError for rows in another order than they came."""
        import bitsandbytes

        weight, scale, bias = self.get_buffer("weight"), self.get_buffer("SCB"), self._buffers["bias"]
        if int(self.get_buffer("weight_format")) != 0:
            raise CheckpointError(
                "this bitsandbytes checkpoint has weights in another order than by rows: save it again"
            )
        made = _blank(weight.shape[1], weight.shape[0], bias is not None, threshold)
        codes = weight.to(device)
        # Without CB the first call would take the codes for weights, and round them once more.
        made.weight = bitsandbytes.nn.Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale.to(device)
        )
        if bias is not None:
            made.bias = nn.Parameter(bias.to(device), requires_grad=False)
        return made


def saved(layer: Any) -> dict[str, torch.Tensor]:
    """Its tensors as a checkpoint has them."""
    weight = layer.weight.data if layer.weight.data.dtype == torch.int8 else layer.state.CB
    found = {"weight": weight, "SCB": scale_of(layer), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


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

    made = bitsandbytes.nn.Linear8bitLt(
        in_features, out_features, bias=bias, has_fp16_weights=False, threshold=threshold, device="meta"
    )
    return made.eval()  # in training, CPUs leave the activations as they are
