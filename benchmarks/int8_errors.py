"""Relative errors of what int8 computes: of single layers, and of the velocity that the demo's transformer predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.demo_checkpoint.evaluate import Case, held_out_cases, render_cases
from benchmarks.int8_kinds import BF16, Bench, Kind, rounded
from ltx_batch import load_renderer
from ltx_batch.model.checkpoint import load_transformer
from ltx_batch.model.quantize.block import fuse_blocks
from ltx_batch.model.quantize.swap import quantize_model

WIDTHS = (4096, 16384)
LARGE = 60.0  # how much larger outliers are than the other inputs


@torch.inference_mode()
def layers(bench: Bench) -> None:
    """Weights and inputs are numbers of 16 bits, as a GPU has them, so that fp32 is exact."""
    for width in WIDTHS:
        draw = torch.Generator().manual_seed(width)
        weight = (torch.randn(1024, width, generator=draw) * width**-0.5).bfloat16().to(bench.device)
        plain = torch.randn(256, width, generator=draw)
        outliers = plain.clone()
        outliers[:, torch.randperm(width, generator=draw)[: width // 1000]] *= LARGE
        for inputs, x in (("gaussian", plain), ("outliers", outliers)):
            x = x.bfloat16().to(bench.device)
            exact = x.float() @ weight.float().T
            for kind in (BF16, *(kind for kind in bench.kinds if "keep_blocks" not in kind.bent)):
                error = relative(layer(weight, kind, bench.device)(x), exact)
                bench.results.add(f"layer_{width}_{inputs}_{kind.name}", float(error))
    bench.results.write()


def layer(weight: torch.Tensor, kind: Kind, device: torch.device) -> nn.Module:
    with torch.inference_mode(False):
        model, plain = nn.Module(), nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
        model.transformer_blocks = nn.ModuleList([nn.ModuleDict({"layer": plain})])
        quantize_model(model, kind.policy(device), device)
    return model.get_submodule("transformer_blocks.0.layer")


def velocity(bench: Bench) -> None:
    calls = recorded(held_out_cases(16), bench.device)

    def measure(checkpoint: str, kind: Kind) -> None:
        model = predictor(bench.checkpoints[checkpoint], kind, bench.device)
        errors = torch.stack([relative(predict(model, inputs), exact, rows=True) for inputs, exact in calls])
        by_step = [rounded(float(value)) for value in errors.median(1).values]
        worst = rounded(float(errors.max()))
        name = f"velocity_{checkpoint}_{kind.name}"
        bench.results.add(name, float(errors.median()), by_step=by_step, worst=worst)

    twin = predictor(bench.checkpoints["twin"], Kind("fp32", "fp32"), bench.device)
    same = [torch.equal(predict(twin, inputs), exact) for inputs, exact in calls]
    bench.results.add("velocity_twin_same_in_fp32", sum(same) / len(same), calls=len(same))
    bench.each((BF16, *bench.kinds), measure)
    for checkpoint in bench.checkpoints:
        plain, turned = (
            bench.results.figures.get(f"velocity_{checkpoint}_{name}") for name in ("int8-hadamard-0", "int8")
        )
        if plain and turned:
            bench.results.add(f"velocity_{checkpoint}_rotation_gain", plain["value"] / turned["value"], "x")
    bench.results.write()


def recorded(cases: Sequence[Case], device: torch.device) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """What the demo's transformer was given and gave, call by call of a whole fp32 render."""
    renderer = load_renderer("demo", precision="fp32", device=device.type)
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []
    handle = renderer._pipeline.transformer.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True
    )
    list(render_cases(renderer, cases))
    handle.remove()
    renderer.close()
    return calls


def predictor(folder: Path, kind: Kind, device: torch.device) -> Any:
    policy = kind.policy(device)
    model = load_transformer(folder, getattr(torch, policy.dtype))
    quantize_model(model, policy, device)
    if policy.quantize == "int8":
        fuse_blocks(model)
    return model.to(device).eval()


@torch.inference_mode()
def predict(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
    cast = {name: inputs[name].to(model.dtype) for name in ("hidden_states", "encoder_hidden_states")}
    out: torch.Tensor = model(**{**inputs, **cast})[0]
    return out.float()


def relative(found: torch.Tensor, exact: torch.Tensor, *, rows: bool = False) -> torch.Tensor:
    """Error over value; of each of the first dimension with `rows`."""
    difference, whole = (found.float() - exact).flatten(int(rows)), exact.flatten(int(rows))
    return difference.norm(dim=-1) / whole.norm(dim=-1)
