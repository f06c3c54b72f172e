"""The official weights by name: what `model.checkpoint` and `ltx-batch fetch` call them, and where the hub keeps them.

A checkpoint and the pipeline config that was made for it share their name. No torch.

Sizes: Comfy-Org/ComfyUI-Manager, model-list.json; of T5, the index of its two files. Licences: the model cards of
Lightricks/LTX-Video and PixArt-alpha/PixArt-XL-2-1024-MS. They serve a list that needs no network; what `fetch` says before
it asks comes from the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any

from ltx_batch.model.presets import PRESETS

_REPO = "Lightricks/LTX-Video"
TEXT_ENCODER = "t5"
TEXT_FOLDERS = ("text_encoder", "tokenizer")
_GB = {"13b": 28.6, "13b-fp8": 15.7, "2b": 6.34, "2b-fp8": 4.46, "ltxv-2b-0.9.1": 5.72, "ltxv-2b-0.9": 9.37}
_EARLY = {
    "0.9": ("RAIL-M, for research", "ltx-video-2b-v0.9.license.txt"),
    "0.9.1": ("RAIL-M, for research", "ltx-video-2b-v0.9.1.license.txt"),
    "0.9.5": ("OpenRAIL-M", "ltx-video-2b-v0.9.5.license.txt"),
}


@dataclass(frozen=True, slots=True)
class Official:
    """One file of a hub repository, or some of its folders. `upscaler` names the one that the checkpoint's multi-scale
    pipeline takes. `size_gb` is about what is downloaded, in 10^9 bytes; `licence` is a name in the repository's model card,
    `licence_file` its text there, where it has one; `what` says what the thing is, in a few words."""

    name: str
    repo: str
    size_gb: float
    licence: str
    what: str
    licence_file: str | None = None
    file: str | None = None
    folders: tuple[str, ...] = ()
    upscaler: str | None = None
    is_checkpoint: bool = False


def _stem(file: str | None) -> str | None:
    return None if file is None else PurePosixPath(file).stem


def _licence(version: str) -> tuple[str, str]:
    """Name and file, of a release of Lightricks."""
    return _EARLY.get(version, ("LTX-Video Open Weights 0.X", "LTX-Video-Open-Weights-License-0.X.txt"))


def _checkpoint(name: str, preset: Mapping[str, Any]) -> Official:
    size, version, *kind = name.removeprefix("ltxv-").split("-")  # 13b-0.9.8-distilled-fp8
    fp8 = "fp8" in kind
    parts = [
        f"{size.upper()} model",
        *(["distilled: few steps"] if "distilled" in kind else ["guided: many steps"]),
        "two passes" if preset["pipeline_type"] == "multi-scale" else "one pass",
        *(["fp8 file"] if fp8 else []),
    ]
    size_gb = _GB.get(name) or _GB[f"{size}-fp8" if fp8 else size]
    licence, licence_file = _licence(version)
    return Official(
        name,
        _REPO,
        size_gb,
        licence,
        ", ".join(parts),
        licence_file,
        preset["checkpoint_path"],
        upscaler=_stem(preset.get("spatial_upscaler_model_path")),
        is_checkpoint=True,
    )


def _upscaler(name: str) -> Official:
    licence, licence_file = _licence(name.rpartition("-")[2])
    what = "doubles height and width between two passes"
    return Official(name, _REPO, 0.51, licence, what, licence_file, f"{name}.safetensors")


_CHECKPOINTS = [_checkpoint(name, preset) for name, preset in PRESETS.items()]
_UPSCALERS = [_upscaler(name) for name in {one.upscaler for one in _CHECKPOINTS} if name]
_TEXT = Official(
    TEXT_ENCODER,
    "PixArt-alpha/PixArt-XL-2-1024-MS",
    19.05,
    "CreativeML Open RAIL++-M",
    "text encoder of every file above: T5-XXL with its tokenizer",
    folders=TEXT_FOLDERS,
)
OFFICIAL: Mapping[str, Official] = MappingProxyType(
    {one.name: one for one in (*_CHECKPOINTS, *sorted(_UPSCALERS, key=lambda one: one.name), _TEXT)}
)


def find_official(name: str) -> Official | None:
    """By name, or by the bare file name, as the official pipeline configs have it."""
    by_file = (one for one in OFFICIAL.values() if one.file == name)
    return OFFICIAL.get(name) or next(by_file, None)
