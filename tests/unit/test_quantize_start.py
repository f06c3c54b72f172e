"""Launches of a kernel that is known: which of them Triton need not look at again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from ltx_batch.model.quantize.kernels import start as module
from ltx_batch.model.quantize.kernels.start import start

GPU = torch.device("cuda", 0)


@dataclass
class OnGpu:
    """As much of a tensor as a launch looks at."""

    address: int = 4096
    dtype: torch.dtype = torch.bfloat16
    device: torch.device = GPU

    def data_ptr(self) -> int:
        return self.address


@dataclass
class Kernel:
    """Notes what is asked of Triton's own launcher, and what goes to a compiled kernel."""

    looked_at: list[tuple[Any, ...]] = field(default_factory=list)
    launched: list[tuple[Any, ...]] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **options: Any) -> Any:
            self.looked_at.append((grid, arguments, options))
            return _Compiled(self)

        return launch


@dataclass
class _Compiled:
    kernel: Kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(module, "_known", {})
    return Kernel()


def launch(kernel: Kernel, *tensors: Any, numbers: tuple[int | float, ...] = (16, 0.5), **given: Any) -> None:
    options = {"programs": 7, "constants": {"gate": 1, "depth": 64}, "warps": 4, "stages": 2, **given}
    start(kernel, options.pop("programs"), tensors, numbers, options.pop("constants"), **options)


def test_a_launch_like_one_before_goes_straight_to_the_compiled_kernel(kernel: Kernel) -> None:
    first, second = (OnGpu(4096), OnGpu(8192)), (OnGpu(16), OnGpu(32))
    launch(kernel, *first, descriptors=("described",))
    options = {"gate": 1, "depth": 64, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
    assert kernel.looked_at == [((7,), ("described", *first, 16, 0.5), options)] and kernel.launched == []
    launch(kernel, *second, descriptors=("another",), programs=9)
    assert len(kernel.looked_at) == 1
    assert kernel.launched == [((9, 1, 1), ("another", *second, 16, 0.5, 1, 64))]  # all parameters, in their order


@pytest.mark.parametrize(
    "given",
    [
        {"numbers": (17, 0.5)},
        {"constants": {"gate": 2, "depth": 64}},
        {"constants": {"gate": 1, "depth": 32}},
        {"warps": 8},
        {"stages": 3},
    ],
)
def test_what_another_kernel_is_made_for_is_looked_at(kernel: Kernel, given: dict[str, Any]) -> None:
    launch(kernel, OnGpu())
    launch(kernel, OnGpu(), **given)
    launch(kernel, OnGpu(dtype=torch.float16))
    assert len(kernel.looked_at) == 3 and kernel.launched == []


def test_an_odd_address_is_always_looked_at(kernel: Kernel) -> None:
    for address in (4096, 4098, 4098):
        launch(kernel, OnGpu(), OnGpu(address))
    assert len(kernel.looked_at) == 3
    launch(kernel, OnGpu(), OnGpu(4112))
    assert len(kernel.looked_at) == 3 and len(kernel.launched) == 1
