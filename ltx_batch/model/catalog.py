"""The official weights by name: what `model.checkpoint` and `ltx-batch fetch` call them, and where the hub keeps them.

A checkpoint and the pipeline config that was made for it share their name. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType

from ltx_batch.model.presets import PRESETS

_REPO = "Lightricks/LTX-Video"
TEXT_ENCODER = "t5"
TEXT_FOLDERS = ("text_encoder", "tokenizer")


@dataclass(frozen=True, slots=True)
class Official:
    """One file of a hub repository, or some of its folders. `upscaler` names the one that the checkpoint's multi-scale
    pipeline takes."""

    name: str
    repo: str
    file: str | None = None
    folders: tuple[str, ...] = ()
    upscaler: str | None = None
    is_checkpoint: bool = False


def _stem(file: str | None) -> str | None:
    return None if file is None else PurePosixPath(file).stem


_CHECKPOINTS = [
    Official(
        name,
        _REPO,
        preset["checkpoint_path"],
        upscaler=_stem(preset.get("spatial_upscaler_model_path")),
        is_checkpoint=True,
    )
    for name, preset in PRESETS.items()
]
_UPSCALERS = [Official(name, _REPO, f"{name}.safetensors") for name in {one.upscaler for one in _CHECKPOINTS} if name]
_TEXT = Official(TEXT_ENCODER, "PixArt-alpha/PixArt-XL-2-1024-MS", folders=TEXT_FOLDERS)
OFFICIAL: Mapping[str, Official] = MappingProxyType(
    {one.name: one for one in (*_CHECKPOINTS, *sorted(_UPSCALERS, key=lambda one: one.name), _TEXT)}
)


def find_official(name: str) -> Official | None:
    """By name, or by the bare file name, as the official pipeline configs have it."""
    by_file = (one for one in OFFICIAL.values() if one.file == name)
    return OFFICIAL.get(name) or next(by_file, None)
