"""What the training slices share: a clock, one flat buffer of weights, steps as CUDA graphs, and several processes.

The networks are so small that launching their kernels one by one takes longer than running them. So each kind of step is
captured once as a CUDA graph, drawing included, and all weights lie in one buffer, which one kernel updates. Start with
`torchrun --nproc-per-node N` to share the work among N devices: each draws its own clips, gradients are averaged.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

Losses = Mapping[str, Tensor]
WARMUP_STEPS = 200  # not seconds: most of the first ones go into capturing graphs


class Slice:
    """A slice of training that ends by the clock. The learning rate rises for a moment and falls along a cosine from
    `lr` to `lr_end` over the slice."""

    def __init__(self, seconds: float, lr: float, lr_end: float) -> None:
        self._seconds, self._lr, self._lr_end = seconds, lr, lr_end
        self._started_s = self._told_s = time.monotonic()
        self._agreed_s = 0.0
        self.step = 0

    def steps(self) -> Iterator[float]:
        """Learning rates until the time is up, which the first process decides for all."""
        self._started_s = time.monotonic()
        while (elapsed_s := self._elapsed_s()) < self._seconds:
            cosine = 0.5 * (1 + math.cos(math.pi * elapsed_s / self._seconds))
            rate = self._lr_end + (self._lr - self._lr_end) * cosine
            yield rate * min(1.0, (self.step + 1) / WARMUP_STEPS)
            self.step += 1

    def _elapsed_s(self) -> float:
        """The first process's time; asked every tenth step only, since reading it waits for the device."""
        elapsed_s = time.monotonic() - self._started_s
        if not dist.is_initialized():
            return elapsed_s
        if self.step % 10 == 0:
            clock = torch.tensor([elapsed_s], device="cuda" if torch.cuda.is_available() else "cpu")
            dist.broadcast(clock, 0)
            self._agreed_s = float(clock)
        return self._agreed_s

    def tell(self, losses: Losses) -> None:
        """Print now and then; reading the values waits for the device, so not at every step."""
        now_s = time.monotonic()
        if rank() == 0 and now_s - self._told_s >= 15:
            self._told_s = now_s
            found = " ".join(f"{name} {float(value):.4f}" for name, value in losses.items())
            print(f"{now_s - self._started_s:6.0f} s step {self.step} {found}", flush=True)


class Weights:
    """The parameters of a module as views of one buffer, with their gradients, their moments (AdamW) and their average."""

    def __init__(
        self,
        module: nn.Module,
        *,
        betas: tuple[float, float],
        average: float,
        weight_decay: float = 0.0,
    ) -> None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
        if dist.is_initialized():
            dist.broadcast(self.flat.data, 0)
        self.flat.grad = torch.zeros_like(self.flat)
        start = 0
        for parameter in parameters:
            stop = start + parameter.numel()
            parameter.data = self.flat.data[start:stop].view_as(parameter)
            parameter.grad = self.flat.grad[start:stop].view_as(parameter)
            start = stop
        fused = self.flat.device.type == "cuda"
        self._optimizer = torch.optim.AdamW([self.flat], betas=betas, weight_decay=weight_decay, fused=fused)
        self._average, self._decay, self._updates = self.flat.detach().clone(), average, 0

    @torch.no_grad()
    def update(self, lr: float, *, max_norm: float = 1.0) -> None:
        """One AdamW step with the gradients of all processes, clipped; then the average follows."""
        gradient = self.flat.grad
        assert gradient is not None
        if dist.is_initialized():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        gradient *= (max_norm / (gradient.norm() + 1e-6)).clamp(max=1)
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        self._updates += 1
        self._average.lerp_(self.flat, 1 - min(self._decay, (1 + self._updates) / (10 + self._updates)))

    @torch.no_grad()
    def use_average(self) -> None:
        self.flat.copy_(self._average)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The average in the parameters' place, for a moment."""
        with torch.no_grad():
            current = self.flat.detach().clone()
            self.flat.copy_(self._average)
            yield
            self.flat.copy_(current)


class Stepper:
    """Runs forward and backward of a kind of step: captured as a CUDA graph at its first use, directly on a CPU.

    A step is a function without arguments that returns its losses by name, `loss` among them, and draws all that it needs
    from `generator`. Gradients are left in `weights`.
    """

    captured = True  # False: kernels are launched one by one on a GPU too

    def __init__(self, weights: Weights, generator: torch.Generator) -> None:
        self._weights, self._generator = weights, generator
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Losses]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.captured and generator.device.type == "cuda" else None

    def __call__(self, kind: Hashable, step: Callable[[], Losses]) -> Losses:
        if self._pool is None:
            return self._direct(step)
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(step)
        graph, losses = self._graphs[kind]
        graph.replay()
        return losses

    def _direct(self, step: Callable[[], Losses]) -> Losses:
        gradient = self._weights.flat.grad
        assert gradient is not None
        gradient.zero_()
        losses = step()
        losses["loss"].backward()
        return {name: value.detach() for name, value in losses.items()}

    def _capture(self, step: Callable[[], Losses]) -> tuple[torch.cuda.CUDAGraph, Losses]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # kernels are chosen and workspaces made before the capture
            for _ in range(2):
                self._direct(step)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            losses = self._direct(step)
        return graph, losses


def start(seed: int) -> tuple[torch.device, torch.Generator]:
    """This process's device and generator; joins the other processes under torchrun."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(seed)  # the same first weights everywhere
    return device, torch.Generator(device).manual_seed(seed + 1 + rank())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(values: Tensor) -> None:
    """Replace by the mean over all processes."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()


def save(path: Path, **modules: nn.Module) -> None:
    """Written by the first process, in half precision: more than the shipped bf16 keeps."""
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: module.state_dict() for name, module in modules.items()}
        torch.save({n: {k: v.half().contiguous() for k, v in part.items()} for n, part in weights.items()}, path)
    wait()


def wait() -> None:
    """For all processes."""
    if dist.is_initialized():
        dist.barrier()


def load(path: Path, **modules: nn.Module) -> bool:
    """Fill modules from a slice's file; False where there is none, for a first slice."""
    if not path.exists():
        return False
    weights = torch.load(path, map_location="cpu", weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(weights[name])
    return True


def psnr_db(first: Tensor, second: Tensor) -> Tensor:
    """Per row, of pixels in -1..1."""
    error = (first.float() - second.float()).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / error.clamp(min=1e-10))
