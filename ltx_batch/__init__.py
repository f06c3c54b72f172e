"""Render LTX-Video in INT8 from manifests, by the million, without losing a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ltx_batch.clip import Clip
from ltx_batch.request import Condition, LoraRef, RenderRequest

if TYPE_CHECKING:
    from ltx_batch.renderer import load_renderer

__version__ = "0.1.0"
__all__ = ["Clip", "Condition", "LoraRef", "RenderRequest", "load_renderer"]


def __getattr__(name: str) -> Any:
    """`load_renderer` is looked up late: importing ltx_batch must load no torch."""
    if name == "load_renderer":
        from ltx_batch.renderer import load_renderer

        return load_renderer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
