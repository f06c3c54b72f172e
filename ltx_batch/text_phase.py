"""The text phase: every prompt that a run is about to render, into the cache, before anything is rendered."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict
from typing import Any

from ltx_batch.admission import PreparedShard
from ltx_batch.errors import InvalidRow
from ltx_batch.model.plan import Plan
from ltx_batch.pool import Pool
from ltx_batch.renderer import load_planner
from ltx_batch.request import RenderRequest
from ltx_batch.text_worker import BATCH_TEXTS, Encoded
from ltx_batch.worker import WorkerPlan

_KNOWN_TEXTS = 100_000  # texts that are not asked for twice; one that comes back later costs a look into the cache


def encode_texts(pool: Pool, plan: WorkerPlan, shards: Iterator[Future[PreparedShard]]) -> Generator[dict[str, Any]]:
    """Encode what `shards` will render; tells `{"encoded", "cached", "seconds"}` so far, now and then.

    Raises RunStopped where the phase cannot go on.
    """
    model = plan.job.model
    planner = load_planner(
        model.checkpoint or "", pipeline_config=model.pipeline_config, options=plan.job.storage.options
    )
    started_s, total = time.monotonic(), Encoded()
    batches = _batches(_wanted(shards, planner))
    with closing(pool.encode(plan, batches)) as told:
        for done in told:
            total += done
            yield {**asdict(total), "seconds": round(time.monotonic() - started_s, 3)}


def _wanted(shards: Iterator[Future[PreparedShard]], planner: Callable[[RenderRequest], Plan]) -> Iterator[str]:
    """The texts of rows that have no clip yet; a negative prompt only where guidance asks for it."""
    negatives: dict[tuple[Any, ...], bool] = {}
    for shard in shards:
        prepared = shard.result()
        for _, key, request, _ in prepared.wanted:
            if key in prepared.known:
                continue
            batch_key = request.batch_key()
            if batch_key not in negatives:
                negatives[batch_key] = _needs_negative(request, planner)
            yield request.prompt
            if negatives[batch_key]:
                yield request.negative_prompt


def _needs_negative(request: RenderRequest, planner: Callable[[RenderRequest], Plan]) -> bool:
    try:
        return planner(request).needs_negative
    except InvalidRow:  # its render will say so
        return False


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Different texts, in the order they come."""
    known: set[str] = set()
    batch: list[str] = []
    for text in map(str.strip, texts):
        if text in known:
            continue
        if len(known) == _KNOWN_TEXTS:
            known.clear()
        known.add(text)
        batch.append(text)
        if len(batch) == BATCH_TEXTS:
            yield batch
            batch = []
    if batch:
        yield batch
