"""The rotary embedding's tables at a quarter of their size: cosine and sine of a pair of channels are stored once, as
16-bit fixed-point numbers. Those are off by 1.6e-5 at most, where a turned query in bf16 is off by 2e-3."""

from __future__ import annotations

import math

import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed
from torch.nn.functional import pad

Tables = tuple[torch.Tensor, torch.Tensor]

ONE = 32767  # what 1.0 is in a table


class HalfRope(LTXVideoRotaryPosEmbed):
    """diffusers' module, number by number, without the second of each pair: int16 [B, N, dim / 2] each, in parts of `ONE`."""

    @classmethod
    def of(cls, rope: LTXVideoRotaryPosEmbed) -> HalfRope:
        return cls(
            rope.dim,
            rope.base_num_frames,
            rope.base_height,
            rope.base_width,
            rope.patch_size,
            rope.patch_size_t,
            rope.theta,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        rope_interpolation_scale: tuple[torch.Tensor, float, float] | None = None,
        video_coords: torch.Tensor | None = None,
    ) -> Tables:
        device = hidden_states.device
        if video_coords is None:
            grid = self._prepare_video_coords(
                len(hidden_states), num_frames, height, width, rope_interpolation_scale, device
            )
        else:
            bases = (self.base_num_frames, self.base_height, self.base_width)
            grid = torch.stack([video_coords[:, i] / base for i, base in enumerate(bases)], dim=-1)
        exponents = torch.linspace(
            math.log(1.0, self.theta), math.log(self.theta, self.theta), self.dim // 6, device=device
        )
        angles = self.theta**exponents * math.pi / 2.0 * (grid.unsqueeze(-1) * 2 - 1)
        angles = angles.transpose(-1, -2).flatten(2)
        over = self.dim % 6 // 2  # pairs that the three axes leave over are not turned
        return _fixed(pad(angles.cos(), (over, 0), value=1.0)), _fixed(pad(angles.sin_(), (over, 0)))


def whole(tables: Tables) -> Tables:
    """As diffusers' attention takes them: fp32 [B, N, dim]."""
    cos, sin = (floating(table).repeat_interleave(2, dim=-1) for table in tables)
    return cos, sin


def floating(table: torch.Tensor) -> torch.Tensor:
    """A table in fp32."""
    return table.float() * (1 / ONE)


def _fixed(table: torch.Tensor) -> torch.Tensor:
    return table.mul_(ONE).round_().to(torch.int16)
