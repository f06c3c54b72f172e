"""What the measurements of int8 share: models of the real sizes, times in turns, figures into one file."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel

from benchmarks.random_model import TRANSFORMERS, make
from benchmarks.results_file import command, installed
from ltx_batch.model.device import device_name
from ltx_batch.model.quantize.policy import Precision

GIB = 2**30
TINY = {"num_attention_heads": 8, "attention_head_dim": 32, "cross_attention_dim": 256, "num_layers": 3}
VERSIONED = ("ltx-batch", "torch", "triton", "diffusers", "bitsandbytes")
# Ratios of times are above 1 where int8 is faster; overheads are times the unlimited time; memory saved is a fraction.
BOUNDS = {
    "13b_13k_over_bf16": ">= 1.30",
    "13b_2.7k_over_bf16": ">= 1.45",
    "2b_13k_over_bf16": ">= 1.0",
    "13b_13k_over_bnb": ">= 2.5",
    "13b_13k_over_bnb_compiled": ">= 1.4",
    "13b_weights_gib": "<= 12.4",
    "13b_13k_peak_gib": "<= 14.2",
    "stream_13k": "<= 1.03",
    "stream_5.6k": "<= 1.15",
    "render_memory_vs_fp32": ">= 0.68",
    "render_memory_vs_bf16": ">= 0.38",
    "render_8gib": "<= 1.10",
    "render_6gib": "<= 1.25",
    "render_4k_12gib": "<= 1.2",
    "render_2b_4gib": "<= 1.25",
    "cold_start_s": "< 30",
}


@dataclass(slots=True)
class Bench:
    """A device, the policy that all figures are of, and the file that they go into.

    `rounds` is how often a time is taken; `tiny` puts a model of no size in the place of the real ones.
    """

    device: torch.device
    policy: Precision
    tiny: bool
    rounds: int
    output: Path

    def config(self, name: str) -> dict[str, Any]:
        return TINY if self.tiny else TRANSFORMERS[name]

    def base(self, name: str) -> Any:
        """A bf16 transformer with diffusers' blocks, on the device."""
        sizes = {"caption_channels": 64 if self.tiny else 4096, **self.config(name)}
        return make(lambda: LTXVideoTransformer3DModel(**sizes), torch.bfloat16, self.device)

    def report(self, name: str, value: float, unit: str, **more: Any) -> None:
        """One figure to the screen and into the file, where it takes the place of an older one of its name."""
        bound = {"bound": BOUNDS[name]} if name in BOUNDS else {}
        figure = {"name": name, "value": round(value, 4), "unit": unit, **bound, **more}
        figure |= {"device": device_name(self.device), "command": command()}
        print(f"{name:<36} {value:10.4f} {unit:<6} {bound.get('bound', '')}  {more or ''}", flush=True)
        known = json.loads(self.output.read_text()) if self.output.is_file() else {"figures": []}
        figures = [one for one in known["figures"] if one["name"] != name] + [figure]
        told = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "versions": installed(VERSIONED),
            "policy": asdict(self.policy),
            "figures": figures,
        }
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(told, indent=1) + "\n")

    def medians_s(self, calls: Mapping[str, Callable[[], object]], *, warm_up: int = 2) -> dict[str, float]:
        """Seconds of each, in turns."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(warm_up + self.rounds):
            for name, call in calls.items():
                self.wait()
                started_s = time.perf_counter()
                call()
                self.wait()
                if number >= warm_up:
                    times[name].append(time.perf_counter() - started_s)
        return {name: median(found) for name, found in times.items()}

    def kernel_s(self, call: Callable[[], object]) -> float:
        """Seconds of a kernel alone, without what the host takes to launch it."""
        if self.device.type != "cuda":
            return self.medians_s({"": call})[""]
        from ltx_batch.model.quantize.kernels.tune import median_s

        return median_s(call, self.device)

    def kernels_ms(self, call: Callable[[], object], *, most: int = 16) -> dict[str, float]:
        """Milliseconds of one call by kernel, the longest first; on a CPU by operation."""
        on_gpu = self.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[activity]) as profile:
            call()
            self.wait()
        found = [
            (one.self_device_time_total if on_gpu else one.self_cpu_time_total, f"{one.key[:90]} x{one.count}")
            for one in profile.key_averages()
        ]
        return {name: round(us / 1000, 3) for us, name in sorted(found, reverse=True)[:most]}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def compile(self, transformer: Any) -> Any:
        transformer.compile_repeated_blocks(
            fullgraph=True, dynamic=False, **({"backend": "eager"} if self.tiny else {})
        )
        return transformer
