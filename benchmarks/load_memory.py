"""Peak host memory of loading a checkpoint, against the weights that stay.

    python benchmarks/load_memory.py [--megabytes 600]

writes random checkpoints, a folder and an official single file in fp32 and in bf16, and loads each in both. The peak is
VmHWM, reset before each load, less what the process held before it; pages of files that are mapped count. Beside our
loader stands diffusers' own, on the transformer alone.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "load-memory.json"
BOUND = 1.15
DTYPES = ("float32", "bfloat16")
_BLOCK_MB = 16.8  # a transformer block of 8 heads of 64, in fp32
_LAYER_MB = 25.2  # a layer of the text encoder below, in fp32


def measure(places: Sequence[str]) -> list[dict[str, Any]]:
    """Each place in each dtype, in this process. A place is a folder or a .safetensors file beside a text_encoder/."""
    import torch
    from diffusers import LTXVideoTransformer3DModel

    from ltx_batch.model.checkpoint import load_checkpoint

    def ours(place: Path, dtype: torch.dtype) -> list[Any]:
        found = load_checkpoint(place, dtype, text_encoder=place if place.is_dir() else place.parent)
        assert found.text is not None
        return [found.transformer, found.vae, found.latent_upsampler, found.text.load()]

    def diffusers(place: Path, dtype: torch.dtype) -> list[Any]:
        return [LTXVideoTransformer3DModel.from_pretrained(place / "transformer", torch_dtype=dtype)]

    load_checkpoint(Path(places[0]), torch.float32, with_text=False)  # imports and the allocator's first blocks
    figures = []
    for place in map(Path, places):
        for name in DTYPES:
            loaders = {"ltx_batch": ours} | ({"diffusers": diffusers} if place.is_dir() else {})
            for loader, load in loaders.items():
                weights_mb, peak_mb = _peak(lambda load=load, place=place, name=name: load(place, getattr(torch, name)))
                told = {"loader": loader, "place": place.name, "asked": name}
                ratio = round(peak_mb / weights_mb, 3)
                figures.append(
                    told | {"weights_mb": round(weights_mb, 1), "peak_mb": round(peak_mb, 1), "ratio": ratio}
                )
    return figures


def _peak(load: Callable[[], list[Any]]) -> tuple[float, float]:
    """MB of weights, and of memory beyond what was held before."""
    from ltx_batch.model.measure import weights_bytes

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before_mb = _memory_mb("VmRSS")
    models = load()
    peak_mb = _memory_mb("VmHWM") - before_mb
    return sum(weights_bytes(model) for model in models if model is not None) / 2**20, peak_mb


def _memory_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def write_places(target: Path, megabytes: int) -> list[Path]:
    """Checkpoints of about so many MB in fp32, two thirds of it the transformer and one the text encoder."""
    import torch
    from transformers import T5Config, T5EncoderModel

    from tests.official_file import PLAIN, write_official_file
    from tests.tiny_checkpoint import CAPTION_CHANNELS, write_tiny_checkpoint

    sizes = {"num_attention_heads": 8, "attention_head_dim": 64, "cross_attention_dim": 512}
    blocks, layers = round(megabytes / 1.5 / _BLOCK_MB), round(megabytes / 3 / _LAYER_MB)
    text = T5Config(
        vocab_size=259,
        d_model=CAPTION_CHANNELS,
        d_kv=8,
        d_ff=2**17,
        num_layers=max(layers, 1),
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    places = []
    for name in DTYPES:
        folder = write_tiny_checkpoint(target / f"folder-{name}", transformer=sizes | {"num_layers": max(blocks, 1)})
        _recast(folder / "transformer" / "diffusion_pytorch_model.safetensors", getattr(torch, name))
        T5EncoderModel(text).to(getattr(torch, name)).save_pretrained(folder / "text_encoder")
        file = write_official_file(folder, folder / f"file-{name}.safetensors", PLAIN)
        places += [folder, file]
    return places


def _recast(file: Path, dtype: Any) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--places", nargs="+", help="measure these and print them, in place of all that")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.places:
        print(json.dumps(measure(options.places)))
        return
    from benchmarks.results_file import write_result

    with tempfile.TemporaryDirectory() as scratch:
        places = write_places(Path(scratch), options.megabytes)
        command = [sys.executable, __file__, "--places", *map(str, places)]
        told = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    figures = []
    for one in told:
        name = f"{one['loader']}_{one['place'].removesuffix('.safetensors')}_as_{one['asked']}".replace("-", "_")
        bound = {"bound": f"<= {BOUND}"} if one["loader"] == "ltx_batch" else {}
        figures.append({"name": name, "value": one["ratio"], "unit": "peak / weights", **bound})
    notes = f"weights {told[0]['weights_mb']:.0f} MiB in fp32; diffusers maps files, which costs nothing until they are used"
    write_result(RESULT, figures, notes=notes)


if __name__ == "__main__":
    main()
