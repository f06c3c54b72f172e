"""What processes of ours tell torch before they import it."""

from __future__ import annotations

import os

import pytest

from ltx_batch.torch_environment import prepare_torch


def test_what_somebody_set_stays_but_for_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    prepare_torch()
    assert "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    prepare_torch()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    prepare_torch(2)
    assert os.environ["OMP_NUM_THREADS"] == "2"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "backend:cudaMallocAsync"
