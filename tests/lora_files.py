"""Write LoRA files, in every naming that there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Array = NDArray[np.float32]
Pair = tuple[Array, Array]  # down [rank, in], up [out, rank]

DIFFUSERS = "transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"
PLAIN = "{}.lora_A.weight", "{}.lora_B.weight"
COMFYUI = "diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"
KOHYA = "diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"
OFFICIAL = "model.diffusion_model.{}.lora_down.weight", "model.diffusion_model.{}.lora_up.weight"
OLD_DIFFUSERS = "transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight"
PEFT_STATE = "{}.lora_A.default.weight", "{}.lora_B.default.weight"
_OFFICIAL_PARTS = {"proj_in": "patchify_proj", "time_embed": "adaln_single"}


def random_pairs(
    shapes: Mapping[str, Sequence[int]], *, rank: int = 3, seed: int = 0, size: float = 0.2
) -> dict[str, Pair]:
    """A pair for each layer of out_features, in_features."""
    draw = np.random.default_rng(seed)
    return {
        name: tuple(
            draw.normal(scale=size, size=shape).astype(np.float32) for shape in ((rank, inputs), (outputs, rank))
        )
        for name, (outputs, inputs) in shapes.items()
    }  # type: ignore[return-value]


def write_lora(
    path: Path,
    pairs: Mapping[str, Pair],
    naming: tuple[str, str] = DIFFUSERS,
    *,
    alpha: float | None = None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """`alpha` goes into a tensor beside each pair, as kohya's and ComfyUI's tools write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Array] = {}
    for layer, (down, up) in pairs.items():
        name = official(layer) if naming[0].startswith(("diffusion_model.", "model.")) else layer
        tensors |= {naming[0].format(name): down, naming[1].format(name): up}
        if alpha is not None:
            tensors[f"{naming[0].partition('{')[0]}{name}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path, metadata)
    return path


def official(layer: str) -> str:
    """A layer's name in the official checkpoint, from diffusers'."""
    return ".".join(_OFFICIAL_PARTS.get(part, part) for part in layer.split("."))
