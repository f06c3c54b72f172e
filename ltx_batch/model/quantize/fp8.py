"""fp8: a linear layer with weights and activations of 8-bit floats (e4m3), scaled per output channel and per token."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import nn

from ltx_batch.errors import PrecisionError
from ltx_batch.model.quantize import reference
from ltx_batch.model.quantize.ops import fp8_rows

_SINCE = (8, 9)


class Fp8Linear(nn.Module):
    """`weight` float8_e4m3fn [out_features, in_features], `weight_scale` fp32 [out_features], `bias` or None."""

    STORED: ClassVar = {"weight": torch.float8_e4m3fn, "weight_scale": torch.float32}

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
        self.weight = _held(torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn, device=device))
        self.weight_scale = _held(torch.empty(out_features, dtype=torch.float32, device=device))
        self.bias = _held(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def of(cls, layer: nn.Linear, device: torch.device) -> Self:
        """`layer` quantised, on `device`."""
        made = cls(layer.in_features, layer.out_features, bias=layer.bias is not None, dtype=layer.weight.dtype)
        weight, scale = reference.fp8_rows(layer.weight.detach().to(device))
        made.weight, made.weight_scale = _held(weight), _held(scale)
        if layer.bias is not None:
            made.bias = _held(layer.bias.detach().to(device))
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype."""
        rows, scales = fp8_rows(x.reshape(-1, self.in_features))
        if x.device.type == "cpu":  # the same numbers, without the speed
            out = (rows.float() @ self.weight.float().T * scales[:, None] * self.weight_scale).to(x.dtype)
            out = out if self.bias is None else out + self.bias
        else:
            out = torch._scaled_mm(
                rows,
                self.weight.t(),
                scale_a=scales[:, None],
                scale_b=self.weight_scale[None],
                bias=self.bias,
                out_dtype=x.dtype,
            )
        return out.view(*x.shape[:-1], self.out_features)


def check_device(device: torch.device) -> None:
    """Raises PrecisionError where the GPU has no fp8 products. (A CPU computes them the slow way.)"""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _SINCE:
        raise PrecisionError(
            f"fp8 takes a GPU of compute capability 8.9 or newer (RTX 40, L40, H100); {torch.cuda.get_device_name(device)} "
            "has {}.{}: use int8".format(*torch.cuda.get_device_capability(device))
        )


def _held(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
