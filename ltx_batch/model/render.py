"""Requests to clips: the thin layer that joins the pipeline to the project's nouns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from ltx_batch.clip import Clip
from ltx_batch.model.decode import to_uint8
from ltx_batch.model.noise import row_noise
from ltx_batch.model.pipeline import LtxPipeline, Row, Stopwatch
from ltx_batch.model.plan import Plan
from ltx_batch.model.preprocess import ConditionItem, prepare_input_media, prepare_media
from ltx_batch.request import Condition, Prepared, RenderRequest


def render_batch(pipeline: LtxPipeline, plan: Plan, requests: Sequence[RenderRequest], preprocess: str) -> list[Clip]:
    """A clip for each request, in order. Their media are `Prepared`."""
    watch = Stopwatch(pipeline.device)
    on_gpu = pipeline.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(pipeline.device)
    pipeline.loras.use(requests[0].lora_set, watch)
    with watch.stage("text"):
        texts = [
            (
                pipeline.encode(request.prompt),
                pipeline.encode(request.negative_prompt, negative=True) if plan.needs_negative else None,
            )
            for request in requests
        ]
    with watch.stage("condition"):
        rows = [
            Row(
                prompt,
                negative,
                prepare_conditions(request, plan, preprocess),
                row_noise(request.seed),
                prepare_input(request, plan, preprocess),
            )
            for request, (prompt, negative) in zip(requests, texts, strict=True)
        ]
    frames = _render_alike(pipeline, plan, rows, watch)
    peak_bytes = torch.cuda.max_memory_allocated(pipeline.device) if on_gpu else None
    timings = {name: seconds / len(requests) for name, seconds in watch.seconds.items()}
    ran = {**pipeline.ran, **pipeline.loras.ran, "batch_size": len(requests), "text": pipeline.text_told()}
    return [Clip(pixels, plan.frame_rate, dict(timings), dict(ran), peak_bytes) for pixels in frames]


def prepare_conditions(request: RenderRequest, plan: Plan, preprocess: str) -> tuple[ConditionItem, ...]:
    return tuple(
        prepare_media(_loaded(one), one.start_frame, one.strength, plan.target, preprocess)
        for one in request.conditions
    )


def prepare_input(request: RenderRequest, plan: Plan, preprocess: str) -> torch.Tensor | None:
    """What video to video begins from; None where the clip begins from noise."""
    begin = request.input_media
    return None if begin is None else prepare_input_media(_loaded(begin), plan.target, preprocess)


def _loaded(condition: Condition) -> Prepared:
    assert isinstance(condition.media, Prepared)
    return condition.media


def _pixels(video: Iterable[torch.Tensor]) -> NDArray[np.uint8]:
    """uint8 [F, H, W, 3]."""
    return np.concatenate([to_uint8(piece)[0] for piece in video])


def _render_alike(pipeline: LtxPipeline, plan: Plan, rows: Sequence[Row], watch: Stopwatch) -> list[NDArray[np.uint8]]:
    """Rows whose media have equally many frames share a forward pass: the number of tokens hangs on it."""

    def layout(index: int) -> list[int]:
        return [item.pixels.shape[2] for item in rows[index].conditions]

    frames: dict[int, NDArray[np.uint8]] = {}
    for _, group in groupby(sorted(range(len(rows)), key=layout), key=layout):
        alike = list(group)
        rendered = pipeline.render(plan, [rows[i] for i in alike], watch, finish=_pixels)
        frames |= dict(zip(alike, rendered.frames, strict=True))
    return [frames[i] for i in range(len(rows))]
