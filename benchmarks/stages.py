"""Where the time and the memory of a render go: stages of the official two-pass preset, from the prompt to frames.

    python benchmarks/stages.py [--models 2b 13b] [--sizes 704x1216x121 2160x3840x33] [--warm-up 1 0] [--precision bf16]
                                [--placement auto] [--memory-gib 8]
    python benchmarks/stages.py --tiny        # all of it on a CPU in seconds, to try the script

Weights are random, of the real sizes, T5-XXL among them, made on the device. A case is a model and a size: the first render
warms up (`--warm-up 0` leaves that out), the next is measured. Results are written after each case, so that what has been
measured stays when a later case fails.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.random_model import random_parts  # noqa: E402
from benchmarks.results_file import write_result  # noqa: E402
from ltx_batch import RenderRequest  # noqa: E402
from ltx_batch.model import render  # noqa: E402
from ltx_batch.model.device import device_name, give_back, limit_memory, pick_device  # noqa: E402
from ltx_batch.model.memory import GIB  # noqa: E402
from ltx_batch.model.pipeline import LtxPipeline, Stopwatch  # noqa: E402
from ltx_batch.model.pipeline_config import load_pipeline_config  # noqa: E402
from ltx_batch.model.quantize.policy import precision  # noqa: E402
from ltx_batch.renderer import LtxRenderer  # noqa: E402

STAGES = ("text", "condition", "denoise", "upsample", "decode")
PRESETS = {"2b": "ltxv-2b-0.9.8-distilled", "13b": "ltxv-13b-0.9.8-distilled", "tiny": "ltxv-13b-0.9.8-distilled"}
BOUND = 0.05  # how far the stages' sum may be from the wall time


@dataclass(slots=True)
class PeakWatch(Stopwatch):
    """A stopwatch that notes the most memory of each stage too."""

    peaks: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        with Stopwatch.stage(self, name):
            yield
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peaks[name] = max(self.peaks.get(name, 0), peak)
        WATCHES.append(self)


WATCHES: list[PeakWatch] = []


def load(name: str, options: argparse.Namespace, device: torch.device) -> LtxRenderer:
    """Parts begin on the device where all of them may stay there, else in host memory, as parts from files do."""
    policy = precision(options.precision, device.type)
    parts = random_parts(name, getattr(torch, policy.dtype), device)
    home = device
    if options.memory_gib is not None or options.placement in ("offload", "sharded"):
        home = torch.device("cpu")
        for part in (parts.transformer, parts.vae, parts.latent_upsampler):
            part.to(home)
        give_back(device)
    if options.memory_gib is not None:
        limit_memory(device, options.memory_gib)
    pipeline = LtxPipeline(parts, policy, device, placement=options.placement, home=home, memory_gib=options.memory_gib)
    return LtxRenderer(pipeline, load_pipeline_config(PRESETS[name]))


def measure(renderer: LtxRenderer, name: str, size: tuple[int, int, int], warm_up: int) -> list[dict[str, Any]]:
    """Figures of one case. Each render has a prompt of its own, so that none finds its embedding in memory."""
    height, width, num_frames = size
    request = RenderRequest(prompt="warm up", height=height, width=width, num_frames=num_frames, seed=1)
    for number in range(warm_up):
        renderer.render([replace(request, prompt=f"warm up {number}")])
    WATCHES.clear()
    started_s = time.perf_counter()
    clip = renderer.render([replace(request, prompt=f"a red circle moves right, {name} {size}")])[0]
    wall_s = time.perf_counter() - started_s
    peaks = WATCHES[-1].peaks
    assert clip.frames.shape == (num_frames, height, width, 3), clip.frames.shape
    case = f"{name}_{height}x{width}x{num_frames}"
    figures = [
        {"name": f"{case}_{stage}", "value": round(clip.timings[stage], 4), "unit": "s"}
        | ({"peak_gib": round(peaks[stage] / GIB, 2)} if stage in peaks else {})
        for stage in STAGES
        if stage in clip.timings
    ]
    total_s = sum(clip.timings.values())
    placed = clip.ran["placement"]
    figures += [
        {"name": f"{case}_wall", "value": round(wall_s, 4), "unit": "s", "renders_before": warm_up},
        {
            "name": f"{case}_stages_over_wall",
            "value": round(total_s / wall_s, 4),
            "unit": "",
            "bound": f"within {BOUND:g} of 1",
        },
        {
            "name": f"{case}_peak",
            "value": round(max(peaks.values(), default=0) / GIB, 2),
            "unit": "GiB",
            "predicted": round(placed["predicted_peak_bytes"] / GIB, 2),
            "placement": placed,
            "tiling": clip.ran["tiling"],
            "attention": clip.ran["attention"],
            "text": clip.ran["text"],
        },
    ]
    return figures


def print_case(figures: list[dict[str, Any]]) -> None:
    for figure in figures:
        peak = f"  peak {figure['peak_gib']:6.2f} GiB" if "peak_gib" in figure else ""
        print(f"  {figure['name']:<44} {figure['value']:>10} {figure['unit']}{peak}", flush=True)


def parse_size(text: str) -> tuple[int, int, int]:
    height, width, frames = (int(number) for number in text.split("x"))
    return height, width, frames


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["2b", "13b"], default=["2b", "13b"])
    parser.add_argument("--sizes", nargs="+", type=parse_size, default=[(704, 1216, 121), (2160, 3840, 33)])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--placement", default="auto")
    parser.add_argument("--memory-gib", type=float, help="of the GPU that may be used; default: all that is free")
    parser.add_argument("--warm-up", type=int, nargs="+", default=[1], help="renders before the measured one, by size")
    parser.add_argument("--result", type=Path, help="default: results/stages-<GPU>.json")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if options.tiny:
        options.models, options.sizes = ["tiny"], [(64, 96, 9), (128, 192, 9)]
    device = pick_device("cpu" if options.tiny else "cuda")
    gpu = "tiny" if options.tiny else device_name(device).removeprefix("NVIDIA ").split()[0].lower()
    options.result = options.result or ROOT / ("out" if options.tiny else "benchmarks/results") / f"stages-{gpu}.json"
    render.Stopwatch = PeakWatch  # type: ignore[misc]
    run(options, device)


def run(options: argparse.Namespace, device: torch.device) -> None:
    figures: list[dict[str, Any]] = []
    notes = (
        "random weights, from the prompt to uint8 frames, one clip at a time; timings[stage] in s, the GPU waited for"
    )
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    for name in options.models:
        renderer = None
        try:
            started_s = time.perf_counter()
            renderer = load(name, options, device)
            print(f"{name}: made in {time.perf_counter() - started_s:.1f} s", flush=True)
            for number, size in enumerate(options.sizes):
                try:
                    found = measure(renderer, name, size, options.warm_up[min(number, len(options.warm_up) - 1)])
                except Exception as error:
                    traceback.print_exc()
                    found = [
                        {"name": f"{name}_{'x'.join(map(str, size))}_failed", "value": str(error)[:300], "unit": ""}
                    ]
                print_case(found)
                figures += found
                write_result(options.result, figures, notes=notes, device=on)
        except Exception:
            traceback.print_exc()
        finally:
            if renderer is not None:
                renderer.close()
            del renderer
            gc.collect()
            give_back(device)
            if device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0, device)


if __name__ == "__main__":
    main()
