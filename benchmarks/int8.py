"""What int8 buys: steps of the real sizes against bf16 and bitsandbytes, memory, kernels one by one.

    python benchmarks/int8.py steps    [--models 13b 2b] [--tokens 13376 2688] [--hadamard-group 64] [--keep-blocks N]
    python benchmarks/int8.py memory   [--models 13b 2b]
    python benchmarks/int8.py stream   [--models 13b] [--tokens 13376 5600] [--memory-gib 8]
    python benchmarks/int8.py kernels  [--models 13b 2b] [--tokens 13376]
    python benchmarks/int8.py choice   [--models 13b 2b] [--tokens 13376 2688]
    python benchmarks/int8.py steps --tiny        # any of them on a CPU in seconds, to try the script

Weights are random, of the real sizes, made on the device. What is compared lies on the device side by side and runs in turns;
times are medians. Figures go into results/int8-<GPU>.json, each with the command that measured it; one that is measured
again replaces the old one.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.int8_bench import GIB, Bench  # noqa: E402
from ltx_batch.model.device import device_name, pick_device  # noqa: E402
from ltx_batch.model.graphs import StepGraphs  # noqa: E402
from ltx_batch.model.guests import Streamed  # noqa: E402
from ltx_batch.model.quantize import ops  # noqa: E402
from ltx_batch.model.quantize.block import fuse_blocks  # noqa: E402
from ltx_batch.model.quantize.choose import choose  # noqa: E402
from ltx_batch.model.quantize.policy import Precision, matches, precision  # noqa: E402
from ltx_batch.model.quantize.probe import probe  # noqa: E402
from ltx_batch.model.quantize.swap import quantize_model, stored_bytes  # noqa: E402
from ltx_batch.model.quantize.text_rows import text_kept  # noqa: E402

TEXT_TOKENS = 256
# These as the product calls them, which records calls as CUDA graphs; int8_launched always from Python.
RECORDED = ("int8", "fp8", "int8_weight")
KINDS = ("bf16", "bf16_compiled", "control", *RECORDED, "int8_launched", "int8_compiled", "bnb", "bnb_compiled")
# Models and tokens of each verb, where nothing else is asked for.
DEFAULTS = {
    "steps": (["13b", "2b"], [13376, 2688]),
    "choice": (["13b", "2b"], [13376, 2688]),
    "memory": (["13b", "2b"], [13376]),
    "stream": (["13b"], [13376, 5600]),
    "kernels": (["13b", "2b"], [13376]),
}
LISTED = ("bf16_compiled", "control", "int8")
RATIOS = {
    "over_bf16": ("bf16_compiled", "int8"),
    "over_bf16_launched": ("bf16_compiled", "int8_launched"),
    "over_bf16_compiled": ("bf16_compiled", "int8_compiled"),
    "over_bf16_eager": ("bf16", "int8"),
    "control": ("bf16_compiled", "control"),
    "over_bnb": ("bnb", "int8"),
    "over_bnb_compiled": ("bnb_compiled", "int8"),
    "fp8_over_bf16": ("bf16_compiled", "fp8"),
    "int8_weight_over_bf16": ("bf16_compiled", "int8_weight"),
}


def twin(transformer: Any, *, own: tuple[str, ...] = ()) -> Any:
    """The same weights under modules of their own, which may be swapped; layers that match `own` are copied."""
    weights = transformer.named_parameters()
    shared = [weight for name, weight in weights if not any(matches(name, pattern) for pattern in own)]
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in (*shared, *transformer.buffers())})


def fused(transformer: Any) -> Any:
    assert fuse_blocks(transformer)
    return transformer.to(transformer.device)  # parks what works once a clip


def quantised(transformer: Any, policy: Precision, device: torch.device) -> Any:
    quantize_model(transformer, policy, device)
    return fused(transformer) if policy.quantize == "int8" else transformer


def step(
    transformer: Any, tokens: int, *, seed: int = 0, graphs: StepGraphs | None = None
) -> Callable[[], torch.Tensor]:
    """A call of the transformer with a prompt of 40 tokens, as the denoise loop makes it."""
    device, channels = transformer.device, transformer.config.caption_channels
    draw = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(1, tokens, transformer.config.in_channels, generator=draw, device=device).bfloat16()
    embeds = torch.randn(1, TEXT_TOKENS, channels, generator=draw, device=device).bfloat16()
    arguments = {
        "hidden_states": hidden,
        "encoder_hidden_states": embeds,
        "encoder_attention_mask": (torch.arange(TEXT_TOKENS, device=device) < 40)[None],
        "timestep": torch.full((1, 1), 700.0, device=device),
        "video_coords": torch.rand(1, 3, tokens, generator=draw, device=device),
        "return_dict": False,
    }
    if graphs is not None:
        return lambda: graphs(transformer, **arguments)
    return lambda: transformer(**arguments)[0]


@torch.inference_mode()
def steps(bench: Bench, options: argparse.Namespace) -> None:
    """Speed of a step over compiled bf16, our kernels around bf16 products, the other precisions, and bitsandbytes."""
    for name in options.models:
        with torch.inference_mode(False):
            models = kinds_of(bench, name, options.kinds)
        for tokens in options.tokens:
            report_steps(bench, name, tokens, models, options.listed)
        del models
        torch.compiler.reset()  # there is a limit to how often one function is compiled
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def kinds_of(bench: Bench, name: str, kinds: Sequence[str]) -> dict[str, Any]:
    """One model of random weights, in each of these ways; weights that are the same lie on the device once."""
    base = bench.base(name)
    parked = bench.policy.parked  # what fused blocks send away, and the others go on using
    models = {}
    if "bf16" in kinds:
        models["bf16"] = base
    if "bf16_compiled" in kinds:
        models["bf16_compiled"] = bench.compile(twin(base))
    if "control" in kinds:
        models["control"] = fused(twin(base, own=parked))
    if "int8" in kinds:
        models["int8"] = quantised(twin(base, own=parked), bench.policy, bench.device)
    if "int8_launched" in kinds:
        models["int8_launched"] = twin(models["int8"])
    if "int8_compiled" in kinds:
        models["int8_compiled"] = bench.compile(twin(models["int8"]))
    for kind in ("fp8", "int8_weight"):
        if kind in kinds:
            policy = precision(kind.replace("_", "-"), bench.device.type)
            models[kind] = quantised(twin(base), policy, bench.device)
    for kind, threshold in (("bnb", 6.0), ("bnb_compiled", 0.0)):
        if kind in kinds and name == "13b":
            policy = precision("bnb-int8", bench.device.type, threshold=threshold)
            models[kind] = quantised(twin(base), policy, bench.device)
            if kind == "bnb_compiled":
                bench.compile(models[kind])
    return models


def report_steps(bench: Bench, name: str, tokens: int, models: Mapping[str, Any], listed: Sequence[str]) -> None:
    case = f"{name}_{short(tokens)}"
    few = [kind for kind in models if "bnb" not in kind or short(tokens) == "13k" or bench.tiny]
    graphs = {kind: StepGraphs(bench.device) for kind in RECORDED if kind in few}
    calls = {kind: step(models[kind], tokens, graphs=graphs.get(kind)) for kind in few}
    first_s: dict[str, float] = {}
    for kind, call in calls.items():
        started_s = time.perf_counter()
        call()
        bench.wait()
        first_s[kind] = time.perf_counter() - started_s
    with ExitStack() as stack:
        for kind in few:
            stack.enter_context(text_kept(models[kind]))
        for kind, recorded in graphs.items():
            stack.enter_context(recorded.at_work(models[kind], tokens, spare_bytes=8 * GIB))
        times = bench.medians_s(calls, warm_up=2)
        kernels = {kind: bench.kernels_ms(call) for kind, call in calls.items() if kind in listed}
    for kind, seconds in times.items():
        more = {"kernels_ms": kernels[kind]} if kind in kernels else {}
        bench.report(f"{case}_{kind}_ms", 1000 * seconds, "ms", first_call_s=round(first_s[kind], 2), **more)
    for ratio, (slow, fast) in RATIOS.items():
        if slow in times and fast in times:
            bench.report(f"{case}_{ratio}", times[slow] / times[fast], "x")
    if "bf16" in calls and "int8" in calls:
        with torch.inference_mode():
            expected, found = (calls[kind]().float() for kind in ("bf16", "int8"))
        bench.report(f"{case}_velocity_error", float((found - expected).norm() / expected.norm()), "")


def choice(bench: Bench, options: argparse.Namespace) -> None:
    """What `auto` becomes here, from one block of each size in each precision that it may take."""
    for name in options.models:
        for tokens in options.tokens:
            times_s, refused = probe(bench.config(name)["cross_attention_dim"], bench.device, tokens=tokens)
            chosen, reason = choose(times_s, refused=refused)
            blocks_ms = {kind: round(1000 * seconds, 3) for kind, seconds in times_s.items()}
            speed = times_s["bf16"] / times_s[chosen]
            label = f"{name}_{short(tokens)}_auto_over_bf16"
            bench.report(label, speed, "x", chosen=chosen, reason=reason, blocks_ms=blocks_ms)


@torch.inference_mode()
def memory(bench: Bench, options: argparse.Namespace) -> None:
    """Weights and peak of the transformer alone on the device."""
    for name in options.models:
        with torch.inference_mode(False):
            base = bench.base(name)
            before = stored_bytes(base, bench.device)
            model = quantised(base, bench.policy, bench.device)
        held = stored_bytes(model, bench.device)
        bench.report(f"{name}_weights_gib", held / GIB, "GiB", bf16_gib=round(before / GIB, 3))
        bench.report(f"{name}_weights_over_bf16", held / before, "")
        for tokens in options.tokens:
            call = step(model, tokens)
            with text_kept(model):
                call()
                if bench.device.type != "cuda":
                    continue
                torch.cuda.reset_peak_memory_stats(bench.device)
                call()
                bench.wait()
                peak = torch.cuda.max_memory_allocated(bench.device)
            bench.report(f"{name}_{short(tokens)}_peak_gib", peak / GIB, "GiB")
        del base, model


@torch.inference_mode()
def stream(bench: Bench, options: argparse.Namespace) -> None:
    """A step with blocks from host memory over the same with all of them on the device."""
    for name in options.models:
        with torch.inference_mode(False):
            resident = quantised(bench.base(name), bench.policy, bench.device)
            streamed = copy.deepcopy(resident)
            blocks = list(streamed.transformer_blocks)
            block_bytes = max(stored_bytes(block, bench.device) for block in blocks)
            guests = Streamed(streamed, blocks, bench.device)
        for tokens in options.tokens:
            activations = 40 * tokens * bench.config(name)["cross_attention_dim"]
            room = int(options.memory_gib * GIB) - activations - 2 * block_bytes - GIB
            kept = 0 if short(tokens) == "13k" else max(0, min(len(blocks), room // block_bytes))
            guests.come(kept)
            calls = {"resident": step(resident, tokens), "streamed": step(streamed, tokens)}
            with text_kept(resident), text_kept(streamed):
                times = bench.medians_s(calls)
            prefix = "stream" if name == "13b" else f"{name}_stream"
            bench.report(f"{prefix}_{short(tokens)}", times["streamed"] / times["resident"], "x", kept_blocks=kept)


@torch.inference_mode()
def kernels(bench: Bench, options: argparse.Namespace) -> None:
    """Each kernel on the shapes of a step: TOPS of products, GB/s of what reads rows."""
    for name in options.models:
        width = bench.config(name)["cross_attention_dim"]
        for tokens in options.tokens:
            for inputs, outputs, parts in (
                (width, width, 1),
                (width, width, 3),
                (width, 4 * width, 1),
                (4 * width, width, 1),
            ):
                report_product(bench, tokens, inputs, outputs, parts)
            for group in (0, 64, 256):
                report_rows(bench, tokens, width, group)


def report_product(bench: Bench, tokens: int, inputs: int, outputs: int, parts: int) -> None:
    device = bench.device
    rows = torch.randint(-127, 128, (tokens, inputs), dtype=torch.int8, device=device)
    weights = list(torch.randint(-127, 128, (parts * outputs, inputs), dtype=torch.int8, device=device).split(outputs))
    scales = [torch.rand(outputs, device=device) for _ in weights]
    biases = [torch.randn(outputs, device=device).bfloat16() for _ in weights]
    row_scales = torch.rand(tokens, device=device)
    x, weight = rows.bfloat16(), torch.cat(weights).bfloat16()
    calls = {
        "int8": lambda: ops.int8_product(rows, row_scales, weights, scales, biases, torch.bfloat16),
        "bf16": lambda: nn.functional.linear(x, weight),
    }
    operations = 2 * tokens * inputs * outputs * parts
    for kind, call in calls.items():
        seconds = bench.kernel_s(call)
        label = f"{short(tokens)}_{inputs}x{outputs}{'x3' if parts == 3 else ''}"
        bench.report(f"product_{label}_{kind}", operations / seconds / 1e12, "TOPS", ms=round(1000 * seconds, 3))


def report_rows(bench: Bench, tokens: int, width: int, group: int) -> None:
    device = bench.device
    x = torch.randn(tokens, width, device=device).bfloat16()
    middle = torch.randn(tokens, 4 * width, device=device).bfloat16()
    table, lines = torch.randn(6, width, device=device).bfloat16(), torch.randn(1, 6 * width, device=device).bfloat16()
    qkv, tables = (
        torch.randn(tokens, 3 * width, device=device).bfloat16(),
        torch.randn(2, tokens, width // 2, device=device),
    )
    query, key, _ = qkv.chunk(3, dim=1)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        f"quantise_{group}": (lambda: ops.quantize_rows(x, group), 3 * x.numel()),
        f"modulate_quantise_{group}": (lambda: ops.quantize_modulated(x, table, lines, 0, 1e-6, group), 3 * x.numel()),
        f"gelu_quantise_{group}": (lambda: ops.quantize_rows(middle, group, True), 3 * middle.numel()),
    }
    if group == 0:
        rotate = lambda: ops.norm_rotate(query, key, table[0], table[1], *tables, 1e-5)  # noqa: E731
        calls["norm_rotate"] = (rotate, 8 * x.numel() + 8 * tables[0].numel())
        calls["modulate"] = (lambda: ops.modulate_rows(x, table, lines, 0, 1e-6), 4 * x.numel())
    for kind, (call, count) in calls.items():
        seconds = bench.kernel_s(call)
        label = f"rows_{short(tokens)}_{width}_{kind}"
        bench.report(label, count / seconds / 1e9, "GB/s", ms=round(1000 * seconds, 3))


def short(tokens: int) -> str:
    return {13376: "13k", 2688: "2.7k", 5600: "5.6k"}.get(tokens, str(tokens))


def main() -> None:
    verbs: dict[str, Callable[[Bench, argparse.Namespace], None]] = {
        "steps": steps,
        "choice": choice,
        "memory": memory,
        "stream": stream,
        "kernels": kernels,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="+", choices=verbs)
    parser.add_argument("--models", nargs="+", choices=["13b", "2b"])
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--hadamard-group", type=int, default=None)
    parser.add_argument("--keep-blocks", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-gib", type=float, default=8.0)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--listed", nargs="*", default=LISTED, choices=KINDS, help="kinds whose kernels are listed")
    parser.add_argument("--verbose", action="store_true", help="tell how long each way to launch a kernel takes")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on a CPU: tries the script, measures nothing")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("ltx_batch").setLevel(logging.DEBUG if options.verbose else logging.WARNING)
    device = torch.device("cpu") if options.tiny else pick_device("cuda")
    if options.tiny:
        torch.set_num_threads(1)
        options.tokens, options.rounds = [24], 1
    policy = precision("int8", "cuda", hadamard_group=options.hadamard_group, keep_blocks=options.keep_blocks)
    gpu = "tiny" if options.tiny else device_name(device).removeprefix("NVIDIA ").split()[0].lower()
    place = ROOT / ("out" if options.tiny else "benchmarks/results") / f"int8-{gpu}.json"
    torch.manual_seed(0)
    bench = Bench(device, policy, options.tiny, options.rounds, options.output or place)
    for verb in options.verbs:
        usual = DEFAULTS[verb]
        given = {"models": options.models or usual[0], "tokens": options.tokens or usual[1]}
        verbs[verb](bench, argparse.Namespace(**{**vars(options), **given}))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"written to {bench.output}")


if __name__ == "__main__":
    main()
