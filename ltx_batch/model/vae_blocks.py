"""The official VAE's lists of blocks, in the words of diffusers. No torch.

Lightricks/LTX-Video describes encoder and decoder as lists such as `[["res_x", 4], ["compress_all", 1], ...]` and names
its modules by their place there (models/autoencoders/causal_video_autoencoder.py, Encoder and Decoder; the decoder runs
its list backwards). diffusers' AutoencoderKLLTXVideo holds the same modules in groups: a down block is layers, then a
downsampler, then a change of width; an up block a change of width, then an upsampler, then layers; one middle block
stands beside them. Which list belongs to which release is never asked: any list that can be grouped so is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Names of the official blocks that change the size: their strides in time and space, and diffusers' word for them.
_ENCODER_RESAMPLERS = {
    "compress_all": (2, 2, "conv"),
    "compress_space_res": (1, 2, "spatial"),
    "compress_time_res": (2, 1, "temporal"),
    "compress_all_res": (2, 2, "spatiotemporal"),
}
_DECODER_RESAMPLERS = {"compress_all": (2, 2, "")}


@dataclass(frozen=True, slots=True)
class Block:
    """One entry of an official list and its `index` in running order. `layers` is res_x's, `multiplier` of the width."""

    index: int
    name: str
    layers: int = 0
    multiplier: int = 1
    inject_noise: bool = False
    residual: bool = False

    @classmethod
    def parse(cls, index: int, entry: Any) -> Block:
        """`["res_x", 4]` or `["res_x", {"num_layers": 4}]`. Raises ValueError."""
        try:
            name, given = entry
            values: dict[str, Any] = {"num_layers": given} if isinstance(given, int) else dict(given)
        except (TypeError, ValueError):
            raise ValueError(f"a block is a name and its values, found {entry!r}") from None
        doubled = name == "res_x_y" or str(name).endswith("_res")
        return cls(
            index=index,
            name=str(name),
            layers=values.get("num_layers", 1) if name == "res_x" else 0,
            multiplier=values.get("multiplier", 2 if doubled else 1),
            inject_noise=values.get("inject_noise", False),
            residual=values.get("residual", False),
        )


@dataclass(frozen=True, slots=True)
class Grouped:
    """Values for diffusers' configuration; diffusers' module for each official one; modules that diffusers builds and
    the official model has not; how much smaller a latent is in time and in space, before the patches."""

    config: dict[str, Any]
    modules: dict[str, str]
    unused: tuple[str, ...]
    strides: tuple[int, int]


@dataclass(slots=True)
class _Group:
    """A down or up block of diffusers, as far as the list fills it."""

    layers: Block | None = None
    resampler: Block | None = None
    widener: Block | None = None

    @property
    def depth(self) -> int:
        return self.layers.layers if self.layers else 0

    @property
    def multiplier(self) -> int:
        return (self.resampler.multiplier if self.resampler else 1) * (self.widener.multiplier if self.widener else 1)

    @property
    def noisy(self) -> bool:
        return any(block.inject_noise for block in (self.layers, self.widener) if block)


def group_encoder(entries: Sequence[Any], base_channels: int) -> Grouped:
    """The encoder's list. Raises ValueError where diffusers has no such encoder."""
    blocks = [Block.parse(index, entry) for index, entry in enumerate(entries)]
    middle = blocks.pop() if blocks and blocks[-1].name == "res_x" else None
    groups = _group(blocks, ("layers", "resampler", "widener"), _ENCODER_RESAMPLERS)
    widths, types, samplers = [base_channels], [], []
    for one in groups:
        resampler = one.resampler
        plain = resampler is None or resampler.name == "compress_all"
        if resampler and ((plain and resampler.multiplier != 1) or (one.widener and not plain)):
            raise ValueError(f"{resampler.name} together with this change of width is not known")
        widths.append(widths[-1] * one.multiplier)
        types.append("LTXVideoDownBlock3D" if plain else "LTXVideo095DownBlock3D")
        samplers.append(_ENCODER_RESAMPLERS[resampler.name][2] if resampler else "conv")
    if types[-1] == "LTXVideoDownBlock3D":  # then diffusers' widths are those that go into each group
        *widths, last = widths
        if last != widths[-1]:
            raise ValueError("the last group of blocks changes the width")
    config = {
        "block_out_channels": tuple(widths),
        "down_block_types": tuple(types),
        "downsample_type": tuple(samplers),
        "spatio_temporal_scaling": tuple(one.resampler is not None for one in groups),
        "layers_per_block": (*(one.depth for one in groups), middle.layers if middle else 0),
    }
    names = {"layers": "", "resampler": ".downsamplers.0", "widener": ".conv_out"}
    modules = _modules("encoder", "down_blocks", groups, names, middle)
    return Grouped(config, modules, (), _strides(groups, _ENCODER_RESAMPLERS))


def group_decoder(entries: Sequence[Any], base_channels: int, *, timestep_conditioning: bool) -> Grouped:
    """The decoder's list. Raises ValueError where diffusers has no such decoder."""
    blocks = [Block.parse(index, entry) for index, entry in enumerate(reversed(entries))]
    width = base_channels
    for block in blocks:
        width *= block.multiplier
    middle = blocks.pop(0) if blocks and blocks[0].name == "res_x" else None
    groups = _group(blocks, ("widener", "resampler", "layers"), _DECODER_RESAMPLERS)
    widths: list[int] = []
    factors: list[int] = []
    for one in groups:
        factor = one.resampler.multiplier if one.resampler else 1
        if one.widener and (factor != 1 or timestep_conditioning or not widths):
            raise ValueError(
                "res_x_y is known only without timesteps, after a first group, before a plain compress_all"
            )
        width //= one.widener.multiplier if one.widener else 1
        widths.append(width)
        factors.append(factor)
        width //= factor
    config: dict[str, list[Any]] = {
        "decoder_block_out_channels": widths,
        "decoder_layers_per_block": [middle.layers if middle else 0, *(one.depth for one in groups)],
        "decoder_inject_noise": [bool(middle and middle.inject_noise), *(one.noisy for one in groups)],
        "decoder_spatio_temporal_scaling": [one.resampler is not None for one in groups],
        "upsample_residual": [bool(one.resampler and one.resampler.residual) for one in groups],
        "upsample_factor": factors,
    }
    names = {"layers": "", "resampler": ".upsamplers.0", "widener": ".conv_in"}
    modules = _modules("decoder", "up_blocks", groups, names, middle)
    bare = [f"decoder.up_blocks.{place}" for place, one in enumerate(groups) if not one.layers]
    unused = [] if middle else ["decoder.mid_block"]
    return Grouped(
        {name: tuple(reversed(values)) for name, values in config.items()},
        modules,
        tuple(f"{path}.time_embedder" for path in unused + bare) if timestep_conditioning else (),
        _strides(groups, _DECODER_RESAMPLERS),
    )


def _group(blocks: Sequence[Block], order: tuple[str, ...], resamplers: Mapping[str, Any]) -> list[_Group]:
    """Consecutive blocks whose kinds follow `order` form a group. Raises ValueError for a kind that is not known."""
    kinds = {"res_x": "layers", "res_x_y": "widener", **dict.fromkeys(resamplers, "resampler")}
    groups: list[_Group] = []
    last = len(order)
    for block in blocks:
        if block.name not in kinds:
            raise ValueError(f"block {block.name} is not known here; known are {', '.join(kinds)}")
        place = order.index(kinds[block.name])
        if place <= last:
            groups.append(_Group())
        setattr(groups[-1], kinds[block.name], block)
        last = place
    if not groups:
        raise ValueError("there are no blocks that change the size")
    return groups


def _modules(
    side: str, list_name: str, groups: Sequence[_Group], names: Mapping[str, str], middle: Block | None
) -> dict[str, str]:
    found = {} if middle is None else {f"{side}.{list_name}.{middle.index}": f"{side}.mid_block"}
    for place, one in enumerate(groups):
        for kind, suffix in names.items():
            block = getattr(one, kind)
            if block is not None:
                found[f"{side}.{list_name}.{block.index}"] = f"{side}.{list_name}.{place}{suffix}"
    return found


def _strides(groups: Sequence[_Group], resamplers: Mapping[str, tuple[int, int, str]]) -> tuple[int, int]:
    time, space = 1, 1
    for one in groups:
        if one.resampler:
            time *= resamplers[one.resampler.name][0]
            space *= resamplers[one.resampler.name][1]
    return time, space
