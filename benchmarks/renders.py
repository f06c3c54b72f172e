"""Whole renders of the distilled two-pass presets: memory that int8 saves, times within limits, over two GPUs, cold starts.

    python benchmarks/renders.py limits memory small prompt limits_4k cold    # one process each, one after the other
    python benchmarks/renders.py limits --only render_8gib [--rounds 3]       # one verb, in this process
    CUDA_VISIBLE_DEVICES=0,1 python benchmarks/renders.py sharded
    python benchmarks/renders.py limits memory small prompt limits_4k cold sharded --tiny    # on a CPU in a minute or two

| verb | figures | about, s, on an H100 |
|---|---|---|
| limits | render_8gib, render_6gib: 13B, 704x1216x121 | 120 |
| memory | render_memory_vs_bf16, render_memory_vs_fp32: the same | 110 |
| small | render_2b_4gib | 45 |
| prompt | prompt_to_video_8gib | 70 |
| limits_4k | render_4k_12gib, render_4k_8gib: 13B, 2160x3840x33 | 300 |
| cold | cold_start_s; writes 45 GB below --scratch, and takes them away | 200 |
| sharded | sharded_2gpu: 13B in bf16, 16 GiB of each of two GPUs | 70 |
| claims | frames a second at 1080p with 13B, at 720p with 2B, without a limit | 90 |

Weights are random, of the real sizes, made on the device. A render goes from embeddings to uint8 frames, and what one takes is
the median of `--rounds` after a warm-up of one step in each pass. A limit is what `device_memory_gib` sets: the process may use
no more of the GPU, its context included. Beside each time stands what the driver counted of the process at most. Figures go
into results/int8-<GPU>.json one by one, as those of int8.py do.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ltx_batch.torch_environment import prepare_torch  # noqa: E402

prepare_torch()

import torch  # noqa: E402

from benchmarks.cold_start import measure_starts  # noqa: E402
from benchmarks.device_memory import DriverMemory  # noqa: E402
from benchmarks.int8_bench import Bench  # noqa: E402
from benchmarks.random_model import random_text  # noqa: E402
from benchmarks.render_bench import GIB, Measured, Size, Subject, copy_rate_gb_s, make_subject  # noqa: E402
from ltx_batch.model.device import device_name, pick_device  # noqa: E402
from ltx_batch.model.placement import Strain  # noqa: E402
from ltx_batch.model.quantize.policy import Precision, precision  # noqa: E402

HD: Size = (704, 1216, 121)
UHD: Size = (2160, 3840, 33)
# 1080 and 720 lines, as the model has them
CLAIMS: dict[str, Size] = {"13b_1080p_fps": (1088, 1920, 121), "2b_720p_fps": (704, 1280, 121)}
TINY: dict[Size, Size] = {HD: (128, 192, 9), UHD: (192, 256, 9), **dict.fromkeys(CLAIMS.values(), (128, 192, 9))}
TINY_SHARE = 400  # a tiny model is cramped in such a part of a GPU
SLICE_BYTES = GIB  # of a decode that takes less than the second pass does


@dataclass(frozen=True, slots=True)
class Limit:
    """A figure: the time of a render within so many GiB over the time without a limit."""

    name: str
    size: Size
    memory_gib: float


LIMITS = {
    "limits": ("13b", [Limit("render_8gib", HD, 8), Limit("render_6gib", HD, 6)]),
    "small": ("2b", [Limit("render_2b_4gib", HD, 4)]),
    "limits_4k": ("13b", [Limit("render_4k_12gib", UHD, 12), Limit("render_4k_8gib", UHD, 8)]),
}


@dataclass(slots=True)
class Renders:
    """What the verbs share."""

    bench: Bench
    driver: DriverMemory
    only: tuple[str, ...]
    scratch: Path

    def wanted(self, name: str) -> bool:
        return not self.only or name in self.only

    def subject(self, name: str, policy: Precision | None = None, **how: Any) -> Subject:
        name = "tiny" if self.bench.tiny else name
        if "memory_gib" in how:
            how["memory_gib"] = self.gib(how["memory_gib"])
        return make_subject(name, policy or self.bench.policy, self.bench.device, self.driver, **how)

    def gib(self, memory_gib: float) -> float:
        return memory_gib / TINY_SHARE if self.bench.tiny else memory_gib

    def size(self, size: Size) -> Size:
        return TINY[size] if self.bench.tiny else size

    def policy(self, name: str) -> Precision:
        return precision(name, self.bench.device.type)

    def report(self, name: str, value: float, unit: str, found: Measured, **more: Any) -> None:
        self.bench.report(name, value, unit, **found.told(), **more)


def limits(renders: Renders, verb: str) -> None:
    """Each size without a limit first; then, in the same process, within each limit."""
    model, all_limits = LIMITS[verb]
    chosen = [one for one in all_limits if renders.wanted(one.name)]
    rounds = 1 if verb == "limits_4k" else renders.bench.rounds
    renders.bench.report("host_copy_gb_s", copy_rate_gb_s(renders.bench.device), "GB/s")
    subject = renders.subject(model)
    unlimited = {size: subject.measure(renders.size(size), rounds) for size in {one.size for one in chosen}}
    for size, found in unlimited.items():
        label = f"render_{model}_{'x'.join(map(str, size))}_s"
        renders.report(label, found.seconds, "s", found)
    for one in chosen:
        subject.hold_to(renders.gib(one.memory_gib))
        found = subject.measure(renders.size(one.size), rounds)
        within = {} if renders.bench.tiny else {"within_limit": max(found.driver_bytes) <= one.memory_gib * GIB}
        ratio = found.seconds / unlimited[one.size].seconds
        renders.report(one.name, ratio, "x", found, limit_gib=one.memory_gib, **within)
    subject.close()


def memory(renders: Renders, verb: str) -> None:
    """The same placement on all sides: transformer and VAE in place, no text encoder, the decode in slices."""
    peaks: dict[str, Measured] = {}
    for name in ("int8", "bf16", "fp32"):
        if name == "fp32" and not renders.wanted("render_memory_vs_fp32"):
            continue
        policy = renders.bench.policy if name == "int8" else renders.policy(name)
        subject = renders.subject("13b", policy, placement="resident")
        subject.pipeline.placing._strain = Strain(decode_bytes=2**20 if renders.bench.tiny else SLICE_BYTES)
        # fp32 takes twenty seconds a step, and no step wants more than the first one.
        peaks[name] = subject.measure(renders.size(HD), 1, warm_up=False, short=name == "fp32")
        subject.close()
        renders.report(f"render_{name}_peak_gib", peaks[name].allocated_bytes / GIB, "GiB", peaks[name])
        if name != "int8":
            saved = 1 - peaks["int8"].allocated_bytes / max(1, peaks[name].allocated_bytes)
            seen = {kind: [round(count / GIB, 2) for count in found.driver_bytes] for kind, found in peaks.items()}
            renders.bench.report(f"render_memory_vs_{name}", saved, "", driver_gib=seen)


def prompt(renders: Renders, verb: str) -> None:
    """From the prompt, with T5-XXL in int8, within 8 GiB: seconds by phase. The text encoder comes for every prompt."""
    bench = renders.bench
    dtype = getattr(torch, bench.policy.dtype)
    text = random_text("tiny" if bench.tiny else "13b", dtype, bench.device, precision="int8")
    subject = renders.subject("13b", text=text, at_home=False, memory_gib=8.0)
    found = subject.measure(renders.size(HD), 1)
    encoder = subject.pipeline.text_told()["place"]
    more = {"limit_gib": 8, "text_gib": round(text.weights_bytes / GIB, 2), "text_encoder": encoder}
    renders.report("prompt_to_video_8gib", found.seconds, "s", found, **more)
    subject.close()


def sharded(renders: Renders, verb: str) -> None:
    """13B in bf16: on one GPU without a limit, and dealt over two with 16 GiB of each."""
    if not renders.bench.tiny and torch.cuda.device_count() != 2:
        sys.exit("sharded wants two GPUs: CUDA_VISIBLE_DEVICES=0,1 on a machine that has them")
    policy = renders.policy("bf16")
    subject = renders.subject("13b", policy, placement="resident")
    one = subject.measure(renders.size(HD), renders.bench.rounds)
    subject.close()
    renders.report("sharded_1gpu_s", one.seconds, "s", one)
    subject = renders.subject("13b", policy, at_home=False, placement="sharded", memory_gib=16.0)
    two = subject.measure(renders.size(HD), renders.bench.rounds)
    subject.close()
    renders.report("sharded_2gpu", two.seconds / one.seconds, "x", two, limit_gib=16)


def claims(renders: Renders, verb: str) -> None:
    """Frames of a clip over the seconds that it takes, from embeddings to frames, with all of the GPU."""
    for name, size in CLAIMS.items():
        if renders.wanted(name):
            subject = renders.subject(name.partition("_")[0])
            found = subject.measure(renders.size(size), 1)
            renders.report(name, size[2] / found.seconds, "frames/s", found)
            subject.close()


def cold(renders: Renders, verb: str) -> None:
    """From the start of a process to its first step: the load with its imports, the step. Eager, as everything ships."""
    starts = measure_starts(renders.scratch, renders.bench.policy, renders.wanted, tiny=renders.bench.tiny)
    for name, start in starts:
        renders.bench.report(name, start.pop("seconds"), "s", **start)


VERBS: Mapping[str, Callable[[Renders, str], None]] = {
    **dict.fromkeys(LIMITS, limits),
    "memory": memory,
    "prompt": prompt,
    "sharded": sharded,
    "cold": cold,
    "claims": claims,
}
ESTIMATES_S = {
    "limits": 120,
    "memory": 110,
    "small": 45,
    "prompt": 70,
    "limits_4k": 300,
    "cold": 200,
    "sharded": 70,
    "claims": 90,
}


def one_by_one(verbs: list[str], arguments: list[str]) -> None:
    """A process for each, so that none finds what another left on the GPU; one that fails stops no other."""
    for verb in verbs:
        print(f"== {verb}: about {ESTIMATES_S[verb]} s", flush=True)
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([sys.executable, __file__, verb, *arguments], timeout=4 * ESTIMATES_S[verb])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="+", choices=VERBS)
    parser.add_argument("--only", nargs="+", default=[], help="these figures alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hadamard-group", type=int, default=None)
    parser.add_argument("--keep-blocks", type=int, default=None)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/ltx-batch-renders"), help="a folder on a local disk")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU: tries the script, measures nothing")
    options = parser.parse_args()
    if len(options.verbs) > 1:
        one_by_one(options.verbs, [word for word in sys.argv[1:] if word not in options.verbs])
        return
    driver = DriverMemory.here(on_gpu=not options.tiny)
    device = pick_device("cpu" if options.tiny else "cuda")
    if options.tiny:
        torch.set_num_threads(1)
    policy = precision("int8", device.type, hadamard_group=options.hadamard_group, keep_blocks=options.keep_blocks)
    gpu = "tiny" if options.tiny else device_name(device).removeprefix("NVIDIA ").split()[0].lower()
    place = ROOT / ("out" if options.tiny else "benchmarks/results") / f"int8-{gpu}.json"
    bench = Bench(device, policy, options.tiny, 1 if options.tiny else options.rounds, options.output or place)
    (verb,) = options.verbs
    VERBS[verb](Renders(bench, driver, tuple(options.only), options.scratch), verb)
    print(f"written to {bench.output}")


if __name__ == "__main__":
    main()
