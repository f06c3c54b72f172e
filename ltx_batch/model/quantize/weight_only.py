"""int8-weight: int8 weights, products in 16 bits (W8A16). It saves memory and no time: a weight is made whole for each use."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import nn
from torch.nn.functional import linear

from ltx_batch.model.quantize.reference import LIMIT

GROUP = 128  # inputs that share a scale


class Int8WeightLinear(nn.Module):
    """`weight` int8 [out_features, in_features], `weight_scale` bf16 [out_features, groups], `bias` in the model's dtype."""

    STORED: ClassVar = {"weight": torch.int8, "weight_scale": torch.bfloat16}

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        groups = in_features // _group(in_features)
        self.weight = _held(torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.weight_scale = _held(torch.empty(out_features, groups, dtype=torch.bfloat16, device=device))
        self.bias = _held(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def of(cls, layer: nn.Linear, device: torch.device) -> Self:
        """`layer` quantised, on `device`."""
        made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype)
        groups = layer.weight.detach().to(device).unflatten(1, (-1, _group(layer.in_features)))
        rounded, scale = round_to_scale(groups)
        made.weight, made.weight_scale = _held(rounded.flatten(1)), _held(scale.squeeze(-1))
        if layer.bias is not None:
            made.bias = _held(layer.bias.detach().to(device))
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype, which is the model's."""
        groups = self.weight.unflatten(1, (self.weight_scale.shape[1], -1)).to(x.dtype)
        return linear(x, groups.mul_(self.weight_scale[..., None]).flatten(1), self.bias)


class Int8WeightConv3d(nn.Conv3d):
    """A convolution with `weight` int8 [out, in, t, h, w] and `weight_scale` [out, 1, 1, 1, 1] in the model's dtype, by which
    diffusers tells what a VAE computes in."""

    weight_scale: nn.Parameter

    @classmethod
    def of(cls, layer: nn.Conv3d, device: torch.device) -> Self:
        """`layer` quantised, on `device`."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.__dict__.update({name: value for name, value in layer.__dict__.items() if not name.startswith("_")})
        made._reversed_padding_repeated_twice = layer._reversed_padding_repeated_twice
        rounded, scale = round_to_scale(layer.weight.detach().to(device).flatten(1))
        made.weight = _held(rounded.view(layer.weight.shape))
        made.weight_scale = _held(scale.view(-1, 1, 1, 1, 1).to(layer.weight.dtype))
        made.register_parameter("bias", None if layer.bias is None else _held(layer.bias.detach().to(device)))
        return made

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(input.dtype).mul_(self.weight_scale)
        return self._conv_forward(input, weight, self.bias)


def round_to_scale(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values and bf16 scales [..., 1] of the last dimension: half the bytes of fp32, and what is multiplied by later.

    A scale that was rounded down would push the largest weight past 127, so it is rounded up.
    """
    exact = weights.float().abs().amax(-1, keepdim=True) / LIMIT
    scale = exact.to(torch.bfloat16)
    up = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    scale = torch.where(scale.float() < exact, up, scale)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return torch.round(weights.float() / scale.float()).to(torch.int8), scale


def _group(inputs: int) -> int:
    return GROUP if inputs % GROUP == 0 else inputs


def _held(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
