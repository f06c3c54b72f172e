"""What torch reads from the environment, once, when it is first imported or first asks a GPU for memory."""

from __future__ import annotations

import os


def prepare_torch(threads: int | None = None) -> None:
    """For a process of ours that has not imported torch yet: CPU threads, where they are given, and segments that grow.

    With segments of fixed sizes a whole 4K decode ran out of memory over 9 GiB that lay between blocks
    (benchmarks/results/stages-h100.json), and renders within 8 and 4 GiB ran out and went on with less of the model on
    the GPU (benchmarks/README.md). What somebody set of the allocator stays, under its newer name too, which PyTorch 2.9
    ignores for segments that grow (pytorch issue 183387).
    """
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
