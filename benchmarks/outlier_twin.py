"""A twin of a checkpoint: the same function, with a few channels that are 64 times larger than the others.

    python benchmarks/outlier_twin.py out/twin     # the demo's; then: ltx-batch render ... --checkpoint out/twin

Large transformers have such channels, a small one trained for an hour has not, and it is they that spoil int8: a row's largest
number decides how finely all of the row is rounded. Some rows of each attention's `to_v` are multiplied by 64, and the columns
of `to_out` that meet them divided by it. 64 is a power of two, so that only exponents change: in fp32 and in bf16 every later
number is the same to the last bit, and so are the frames.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ltx_batch.renderer import resolve_checkpoint  # noqa: E402

CHANNELS, FACTOR = 4, 64.0
WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")


def with_outliers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of an LTX transformer's weights, by their names; always the same channels of each attention."""
    made = {name: tensor.clone() for name, tensor in weights.items()}
    draw = torch.Generator().manual_seed(0)
    for name in sorted(name for name in made if name.endswith(".to_v.weight")):
        attention = name.removesuffix(".to_v.weight")
        chosen = torch.randperm(len(made[name]), generator=draw)[:CHANNELS]
        made[name][chosen] *= FACTOR
        made[f"{attention}.to_v.bias"][chosen] *= FACTOR
        made[f"{attention}.to_out.0.weight"][:, chosen] /= FACTOR
    return made


def write_twin(folder: Path, source: str = "demo") -> Path:
    """A checkpoint folder like `source`, whose transformer has outliers; returns `folder`, which must not be there."""
    origin = Path(resolve_checkpoint(source))
    shutil.copytree(origin, folder)
    save_file(with_outliers(load_file(origin / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
    return folder


if __name__ == "__main__":
    print(write_twin(Path(sys.argv[1])))
