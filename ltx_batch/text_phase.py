"""The text phase: every prompt that a run is about to render, into the cache, before anything is rendered."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from contextlib import closing
from typing import Any

from ltx_batch.admission import PreparedShard
from ltx_batch.errors import InvalidRow, RunStopped
from ltx_batch.model.plan import Plan
from ltx_batch.pool import Pool
from ltx_batch.renderer import load_planner
from ltx_batch.request import RenderRequest
from ltx_batch.text_worker import BATCH_TEXTS
from ltx_batch.worker import WorkerPlan

_KNOWN_TEXTS = 100_000  # texts that are not asked for twice; one that comes back later costs a look into the cache
_POLL_S = 0.5  # how long to go on without a word while nothing is found
_SHOWN_FAILURES = 5
_SHOWN_CHARS = 80


def encode_texts(pool: Pool, plan: WorkerPlan, shards: Iterator[Future[PreparedShard]]) -> Generator[dict[str, Any]]:
    """Encode what `shards` will render; tells `{"encoded", "cached", "failed", "seconds"}` so far, about twice a second.

    Raises RunStopped where the phase cannot go on, or where no text at all could be encoded.
    """
    model = plan.job.model
    planner = load_planner(
        model.checkpoint or "", pipeline_config=model.pipeline_config, options=plan.job.storage.options
    )
    started_s, counts, reason = time.monotonic(), {"encoded": 0, "cached": 0, "failed": 0}, ""
    with closing(pool.encode(plan, _batches(_wanted(shards, planner)))) as told:
        for done in told:
            for text, reason in done.failed[: max(0, _SHOWN_FAILURES - counts["failed"])]:
                shown = repr(text[:_SHOWN_CHARS])
                print(f"a prompt cannot be encoded, its rows will fail: {shown}: {reason}", file=sys.stderr)
            counts["encoded"] += done.encoded
            counts["cached"] += done.cached
            counts["failed"] += len(done.failed)
            yield {**counts, "seconds": round(time.monotonic() - started_s, 3)}
    if counts["failed"] and not counts["encoded"] + counts["cached"]:
        raise RunStopped(f"prompts could not be encoded: {reason}")


def _wanted(shards: Iterator[Future[PreparedShard]], planner: Callable[[RenderRequest], Plan]) -> Iterator[str | None]:
    """The texts of rows that have no clip yet; a negative prompt only where guidance asks for it. None where it may take
    a while to the next."""
    negatives: dict[tuple[Any, ...], bool] = {}
    for shard in shards:
        while not wait([shard], timeout=_POLL_S).done:
            yield None
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
        yield None


def _needs_negative(request: RenderRequest, planner: Callable[[RenderRequest], Plan]) -> bool:
    try:
        return planner(request).needs_negative
    except InvalidRow:  # its render will say so
        return False


def _batches(texts: Iterator[str | None]) -> Iterator[list[str]]:
    """Different texts, in the order they come; an empty batch now and then while they do not."""
    known: set[str] = set()
    batch: list[str] = []
    told_s = time.monotonic()
    for text in texts:
        plain = None if text is None else text.strip()
        if plain is not None and plain not in known:
            if len(known) == _KNOWN_TEXTS:
                known.clear()
            known.add(plain)
            batch.append(plain)
        full = len(batch) == BATCH_TEXTS
        if full or time.monotonic() - told_s >= _POLL_S:
            yield batch if full else []
            batch, told_s = [] if full else batch, time.monotonic()
    if batch:
        yield batch
