"""int8: a linear layer with int8 weights and int8 activations (W8A8), whose products are int8 too.

Weights are rounded per output channel, once; activations per token, at every call, so nothing is calibrated and no row of
a batch depends on another. With a Hadamard group both are rotated first, which leaves the product as it was.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import nn

from ltx_batch.model.quantize.hadamard import fitting_group
from ltx_batch.model.quantize.ops import int8_product, quantize_rows
from ltx_batch.model.quantize.reference import quantize_weight


class Int8Linear(nn.Module):
    """`weight` int8 [out_features, in_features], `weight_scale` fp32 [out_features], `bias` in the model's dtype or None.

    `hadamard_group` inputs are rotated together, in the weight already and in what comes in at each call; 0 for none.
    """

    STORED: ClassVar = {"weight": torch.int8, "weight_scale": torch.float32}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        hadamard_group: int,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.hadamard_group = in_features, out_features, hadamard_group
        self.weight = _held(torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.weight_scale = _held(torch.empty(out_features, dtype=torch.float32, device=device))
        self.bias = _held(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def of(cls, layer: nn.Linear, device: torch.device, *, hadamard_group: int = 0) -> Self:
        """`layer` quantised, on `device`. The group is the largest that fits, up to the one asked for."""
        group = fitting_group(hadamard_group, layer.in_features)
        made = cls(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            dtype=layer.weight.dtype,
            hadamard_group=group,
        )
        weight, scale = quantize_weight(layer.weight.detach().to(device), group)
        made.weight, made.weight_scale = _held(weight), _held(scale)
        if layer.bias is not None:
            made.bias = _held(layer.bias.detach().to(device))
        return made

    def quantize(self, x: torch.Tensor, *, gelu: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """`x` [M, in_features] as this layer takes it: int8 rows and their scales."""
        return quantize_rows(x, self.hadamard_group, gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype."""
        rows, scales = self.quantize(x.reshape(-1, self.in_features))
        out = int8_product(rows, scales, [self.weight], [self.weight_scale], biases([self]), x.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, hadamard_group={self.hadamard_group}"


def biases(layers: list[Int8Linear]) -> list[torch.Tensor]:
    """Theirs, or none: layers that share a product have all or none."""
    return [layer.bias for layer in layers if layer.bias is not None]


def _held(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
