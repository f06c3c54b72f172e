"""Which kernels of self-attention a job may name, and where they run. No torch."""

from __future__ import annotations

from importlib.util import find_spec

from ltx_batch.errors import JobError


def check_attention(attention: str, precision: str, device: str) -> None:
    """Raises JobError for a kernel of self-attention that cannot run, before anything is started.

    `auto` takes the fastest of torch's own kernels, which differ by rounding alone; `native` leaves it to torch, without a
    stopwatch; `sage` is SageAttention, which rounds queries and keys to int8 and is never taken unasked.
    """
    if attention not in ("auto", "native", "sage"):
        raise JobError(f"unknown attention {attention!r}; what works: auto, native, sage")
    if attention != "sage":
        return
    if device == "cpu" or precision == "fp32":
        place = "on a CPU" if device == "cpu" else "in fp32"
        raise JobError(f"model.attention sage does not run {place}: it takes a GPU and bf16 or an 8-bit precision")
    if find_spec("sageattention") is None:
        raise JobError(
            "model.attention is sage, and SageAttention is not installed: pip install sageattention on every node, or leave "
            "attention at auto"
        )
