"""Which device a name means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ltx_batch.errors import JobError
from ltx_batch.model.device import free_bytes, pick_device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.parametrize(
    ("name", "found"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0"), ("cpu", "cpu")]
)
def test_a_gpu_has_its_number(two_gpus: None, name: str, found: str) -> None:
    assert str(pick_device(name)) == found


def test_memory_is_asked_of_a_gpu_by_its_number(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()

    def told(answer: object) -> Callable[[torch.device], object]:
        def ask(device: torch.device) -> object:
            asked.add(str(device))
            return answer

        return ask

    monkeypatch.setattr(torch.cuda, "mem_get_info", told((50, 100)))
    monkeypatch.setattr(torch.cuda, "memory_allocated", told(10))
    monkeypatch.setattr(torch.cuda, "memory_reserved", told(15))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", told(0.4))
    assert free_bytes(torch.device("cuda")) == 30
    assert asked == {"cuda:1"}


def test_without_a_gpu_there_is_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(pick_device("auto")) == "cpu"
    with pytest.raises(JobError, match=r"torch finds no GPU here; use device: auto, or cpu"):
        pick_device("cuda")
