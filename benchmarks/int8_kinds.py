"""What int8_quality.py compares: precisions by name, the figures they get, and what is measured on."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.results_file import write_result
from ltx_batch.errors import PrecisionError
from ltx_batch.model.device import device_name, give_back
from ltx_batch.model.quantize.policy import Precision, precision
from ltx_batch.model.quantize.swap import check_device

BOUNDS = {
    "velocity_twin_rotation_gain": ">= 2",
    "velocity_twin_same_in_fp32": "== 1",
    "demo_int8_lpips_over_bnb-int8": "<= 1.1",
    "twin_int8_lpips_over_bnb-int8": "<= 1.1",
    "demo_int8_adherence": "within 1",
    "twin_int8_adherence": "within 1",
}
NOTES = (
    "Errors are relative, of the 2-norm. velocity: median over the steps and rows of 16 held-out captions, guidance included, "
    "on the inputs of an fp32 render. clips: 128x128x17, the demo's schedule, frames compared as rendered, never encoded; "
    "values are means over clips, p5 what 5 in 100 clips are worse than; the reference is bf16 with torch's own choice of "
    "attention (on a CPU fp32), floor the same with torch's math attention. adherence: of the reader's attributes the "
    "one whose share of clips that show it differs most from the reference's, in points, over the same clips. Layers that "
    "are not quantised are bf16 on a GPU and fp32 on a CPU."
)


@dataclass(frozen=True)
class Kind:
    """A precision, and how its policy is bent, by `load_renderer`'s names."""

    name: str
    precision: str
    bent: Mapping[str, Any] = field(default_factory=dict)
    other_attention: bool = False

    def policy(self, device: torch.device) -> Precision:
        bent = {name.removeprefix("llm_int8_"): value for name, value in self.bent.items()}
        return precision(self.precision, device.type, **bent)


BF16 = Kind("bf16", "bf16")
KINDS = (
    Kind("int8", "int8"),
    Kind("bnb-int8", "bnb-int8"),
    Kind("int8-weight", "int8-weight"),
    Kind("int8-hadamard-0", "int8", {"hadamard_group": 0}),
    Kind("bnb-int8-threshold-6", "bnb-int8", {"llm_int8_threshold": 6.0}),
    Kind("int8-hadamard-256", "int8", {"hadamard_group": 256}),
    Kind("int8-keep-1", "int8", {"keep_blocks": 1}),
    Kind("fp8", "fp8"),
)


@dataclass
class Results:
    """The figures of this run, which the file holds and nothing else."""

    path: Path
    device: torch.device
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str = "", **more: Any) -> None:
        bound = {"bound": BOUNDS[name]} if name in BOUNDS else {}
        self.figures[name] = {"name": name, "value": rounded(value), "unit": unit, **bound, **more}

    def write(self) -> None:
        gpu = device_name(self.device) if self.device.type == "cuda" else None
        policy = asdict(KINDS[0].policy(self.device))
        write_result(self.path, list(self.figures.values()), notes=NOTES, device=gpu, policy=policy)


@dataclass
class Bench:
    """What is measured: two checkpoints, in these precisions, on this device."""

    device: torch.device
    kinds: Sequence[Kind]
    checkpoints: Mapping[str, Path]
    folder: Path  # for what is thrown away at the end
    clips: int
    workers: int
    results: Results

    def each(self, kinds: Sequence[Kind], measure: Callable[[str, Kind], None]) -> None:
        """`measure` every kind on both checkpoints. What fails is told, and the others go on."""
        for kind in kinds:
            for checkpoint in self.checkpoints:
                started_s = time.perf_counter()
                try:
                    measure(checkpoint, kind)
                except Exception as error:
                    traceback.print_exc()
                    self.results.add(f"{checkpoint}_{kind.name}_failed", 1, error=str(error)[:300])
                gc.collect()
                give_back(self.device)
                print(f"{checkpoint} {kind.name}: {time.perf_counter() - started_s:.1f} s", flush=True)
            self.results.write()


def runs_here(kind: Kind, device: torch.device) -> bool:
    try:
        check_device(kind.policy(device), device)
    except PrecisionError as error:
        print(f"{kind.name} is left out: {error}")
        return False
    return True


def rounded(value: float) -> float:
    """To four digits that count."""
    return float(f"{value:.4g}")
