"""One worker of the text phase: texts into the cache, with nothing loaded but the text encoder. Knows no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from ltx_batch.model.quantize import policy
from ltx_batch.model.text_key import TextIdentity, encoder_fingerprint
from ltx_batch.model.text_precision import embedding_precision
from ltx_batch.renderer import local_text_encoder
from ltx_batch.torch_environment import prepare_torch
from ltx_batch.worker import WorkerPlan, open_text_store

BATCH_TEXTS = 16  # handed over at once: seconds on a CPU, so that a run drains soon
_THREADS = 16


@dataclass(frozen=True, slots=True)
class Encoded:
    """How many texts were encoded, and how many the cache had; those that failed for good, with the reason."""

    encoded: int = 0
    cached: int = 0
    failed: tuple[tuple[str, str], ...] = ()


class TextWorker:
    """Raises UsageError where the plan cannot be honoured here. The encoder is loaded for the first text that the cache
    lacks."""

    def __init__(self, plan: WorkerPlan) -> None:
        job = plan.job
        prepare_torch(job.worker.torch_threads)
        from ltx_batch.model.checkpoint import TextParts
        from ltx_batch.model.device import limit_memory, pick_device, use_threads
        from ltx_batch.model.text import TextEncoder
        from ltx_batch.model.text_cache import open_text_cache
        from ltx_batch.model.turns import Nobody, Turns

        use_threads(job.worker.torch_threads)
        device = pick_device(job.model.device)
        if job.model.device_memory_gib is not None:
            limit_memory(device, job.model.device_memory_gib)
        dtype = policy.precision(plan.precision, device.type).dtype
        folder, expected = local_text_encoder(job.model, plan.recipe, job.storage.options)
        asked = job.model.text_precision
        parts = TextParts.find(folder, dtype, expected.text, precision=asked, device=device)
        self._turns = Turns(device, partial(TextEncoder.load, parts), parts.weights_bytes, Nobody())
        store = open_text_store(job)
        assert store is not None, "a job with a text phase has a text cache"
        identity = TextIdentity(
            encoder_fingerprint(plan.recipe["checkpoint"]["files"]), embedding_precision(asked, dtype)
        )
        self._cache = open_text_cache(store, identity, job.storage.options)
        self._threads = ThreadPoolExecutor(max_workers=_THREADS)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Have the cache hold every one of `texts`, whole. Raises what a store says that cannot be written."""
        found = self._threads.map(self._cache.get, texts)
        missing = [text for text, tokens in zip(texts, found, strict=True) if tokens is None]
        writes = [self._threads.submit(self._cache.put, text, self._turns.encode(text).cpu()) for text in missing]
        for write in writes:
            write.result()
        return Encoded(len(missing), len(texts) - len(missing))

    def close(self) -> None:
        self._threads.shutdown()
        self._turns.close()
