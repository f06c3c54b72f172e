"""One worker: a loaded renderer that turns units into committed clips. Knows no Ray.

`run` may be called from several threads: rendering is one at a time, while other units fetch their media, encode (on a GPU) or
upload. That is the whole of the overlap between the GPU and the rest.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import socket
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ltx_batch.clip import Clip
from ltx_batch.errors import LtxBatchError
from ltx_batch.fake import FakeRenderer, write_fake_video
from ltx_batch.job import JobSpec
from ltx_batch.ledger import Ledger
from ltx_batch.lora import LoraCache
from ltx_batch.media import write_clip
from ltx_batch.model.frames import load_media
from ltx_batch.one_thread import OneThread
from ltx_batch.record import RenderRecord
from ltx_batch.renderer import Renderer, load_renderer
from ltx_batch.request import RenderRequest
from ltx_batch.schedule import Task, WorkUnit
from ltx_batch.storage import Storage
from ltx_batch.torch_environment import prepare_torch

_VERSIONED = ("ltx-batch", "torch", "diffusers", "transformers", "bitsandbytes", "triton", "imageio-ffmpeg", "numpy")
_MESSAGE_CHARS = 2000


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """All that a worker is told. `precision` is resolved; a worker that cannot honour it refuses to start."""

    job: JobSpec
    recipe: Mapping[str, Any]
    precision: str


@dataclass(frozen=True, slots=True)
class _Made:
    """A rendered clip on its way to the output: `video` is its file in scratch, `timings` are seconds by stage so far."""

    task: Task
    clip: Clip
    video: Path
    timings: dict[str, float]


class Worker:
    """Loads the renderer; raises UsageError where the plan cannot be honoured here."""

    def __init__(self, plan: WorkerPlan) -> None:
        prepare_torch(plan.job.worker.torch_threads)
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._plan = plan
        self._ledger = Ledger(open_output(plan.job))
        # One thread loads and renders. With a second one libgomp would keep a second team of threads, see more of them than
        # there are cores, and stop spinning between its loops: a third slower (benchmarks/results/overhead.json).
        self._thread = OneThread("render")
        self._loras = LoraCache(plan.job.storage.options)
        started_s = time.perf_counter()
        self._renderer = self._thread.call(lambda: open_renderer(plan))
        self.load_s = time.perf_counter() - started_s
        self._versions = _versions()

    def describe(self) -> dict[str, Any]:
        return {
            "worker": self.name,
            "device": self._renderer.device,
            "precision": self._renderer.precision,
            "weights_bytes": dict(self._renderer.weights_bytes),
            "load_s": self.load_s,
        }

    def run(self, unit: WorkUnit) -> list[RenderRecord]:
        """Render, encode and commit a unit: one record for each task, in order. Raises nothing: failures are records."""
        records: dict[str, RenderRecord] = {}
        ready: list[tuple[Task, RenderRequest, float]] = []
        for task in unit.tasks:
            with self._catch(task, records):
                found = self._ledger.find(task.key)
                if found is not None:
                    records[task.key] = replace(found, reused=True)
                    continue
                started_s = time.perf_counter()
                request = self._renderer.prepare(self._fetch(task.request))
                ready.append((task, request, time.perf_counter() - started_s))
        try:
            with _scratch() as folder:
                for made in self._render(ready, records, Path(folder)):
                    with self._catch(made.task, records):
                        records[made.task.key] = self._commit(made)
        except Exception as error:
            records |= {task.key: self._failure(task, error) for task, _, _ in ready if task.key not in records}
        return [records[task.key] for task in unit.tasks]

    def close(self) -> None:
        self._renderer.close()
        self._thread.close()

    def _fetch(self, request: RenderRequest) -> RenderRequest:
        """The request with its media and LoRA files read into memory and checked against their hashes."""
        loras = tuple(map(self._loras.fetch, request.lora_set))
        return replace(load_media(request, self._plan.job.storage.options), loras=loras)

    def _render(
        self, ready: list[tuple[Task, RenderRequest, float]], records: dict[str, RenderRecord], folder: Path
    ) -> list[_Made]:
        """Clips, each with the place of its file; a clip that could not be encoded has its record already."""

        def turn() -> list[_Made]:
            made = self._clips(ready, folder)
            # Beside a render on a CPU the encoder would take a core from it, and the others would wait for that one in every
            # loop: in turn they take less together (benchmarks/results/overhead.json).
            for one in made if self._renderer.device == "cpu" else ():
                with self._catch(one.task, records):
                    self._encode(one)
            return [one for one in made if one.task.key not in records]

        return self._thread.call(turn) if ready else []

    def _clips(self, ready: list[tuple[Task, RenderRequest, float]], folder: Path) -> list[_Made]:
        started_s = time.perf_counter()
        unquantised = any(task.unquantised for task, _, _ in ready)
        clips = self._renderer.render([request for _, request, _ in ready], unquantised=unquantised)
        render_s = (time.perf_counter() - started_s) / len(ready)
        return [
            _Made(
                task, clip, folder / f"{task.key}{clip.suffix}", {**clip.timings, "fetch": fetch_s, "render": render_s}
            )
            for (task, _, fetch_s), clip in zip(ready, clips, strict=True)
        ]

    def _commit(self, made: _Made) -> RenderRecord:
        if "encode" not in made.timings:
            self._encode(made)
        return self._ledger.commit(self._record(made.task, made.clip, made.timings), made.video)

    def _encode(self, made: _Made) -> None:
        """The file holds what names it, and nothing that changes from run to run; the rest is in the record."""
        started_s = time.perf_counter()
        if self._plan.job.video.codec == "fake":
            write_fake_video(made.clip, made.video)
        else:
            recipe = json.dumps(dict(self._plan.recipe), sort_keys=True)
            metadata = {"ltx_batch_key": made.task.key, "ltx_batch_recipe": recipe}
            write_clip(made.clip, made.video, self._plan.job.video, metadata=metadata)
        made.timings["encode"] = time.perf_counter() - started_s

    def _record(self, task: Task, clip: Clip, timings: dict[str, float]) -> RenderRecord:
        frames, height, width, _ = clip.frames.shape
        on_gpu = self._renderer.device not in ("cpu", "fake")
        gpus = self._plan.job.worker.num_gpus
        return RenderRecord(
            key=task.key,
            status="ok",
            frames_sha256=clip.frames_sha256(),
            num_frames=frames,
            height=height,
            width=width,
            frame_rate=clip.frame_rate,
            seed=task.request.seed,
            attempts=task.attempt,
            attempt_id=uuid.uuid4().hex,
            timings={name: round(seconds, 4) for name, seconds in timings.items()},
            gpu_seconds=timings["render"] * (1 if gpus is None else gpus) if on_gpu else 0.0,
            peak_bytes=clip.peak_bytes,
            ran=clip.ran,
            degraded=bool(clip.ran.get("degraded")),
            worker=self.name,
            device=self._renderer.device,
            versions=self._versions,
            finished_at=_now(),
        )

    @contextmanager
    def _catch(self, task: Task, records: dict[str, RenderRecord]) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            records[task.key] = self._failure(task, error)

    def _failure(self, task: Task, error: Exception) -> RenderRecord:
        # The last frames of a foreign error say where it arose; ours say what to do in their message.
        place = "" if isinstance(error, LtxBatchError) else "".join(traceback.format_tb(error.__traceback__)[-2:])
        return RenderRecord(
            key=task.key,
            status="failed",
            seed=task.request.seed,
            attempts=task.attempt,
            error_class=type(error).__name__,
            error=f"{error}\n{place}".strip()[:_MESSAGE_CHARS],
            retryable=getattr(error, "retryable", True),
            worker=self.name,
            device=self._renderer.device,
            versions=self._versions,
            finished_at=_now(),
        )


def _scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for one unit's while: a worker is ended by a kill, and must not leave one behind for its whole life."""
    return tempfile.TemporaryDirectory(prefix="ltx_batch-")


def open_output(job: JobSpec) -> Storage:
    return _open(job, job.output)


def open_text_store(job: JobSpec) -> Storage | None:
    """Where embeddings are kept; None: nowhere."""
    return None if job.text_cache_uri is None else _open(job, job.text_cache_uri)


def _open(job: JobSpec, uri: str) -> Storage:
    return Storage(uri, options=job.storage.options, single_writer=job.storage.single_writer)


def open_renderer(plan: WorkerPlan) -> Renderer:
    model = plan.job.model
    if model.renderer == "fake":
        return FakeRenderer(plan.precision)
    return load_renderer(
        model.checkpoint or "",
        precision=plan.precision,
        device=model.device,
        pipeline_config=model.pipeline_config,
        upsampler=model.upsampler,
        text_encoder=model.text_encoder,
        text_precision=model.text_precision,
        placement=model.placement,
        attention=model.attention,
        device_memory_gib=model.device_memory_gib,
        condition_preprocess=plan.recipe["condition_preprocess"],
        llm_int8_threshold=model.llm_int8_threshold,
        skip_modules=model.skip_modules,
        hadamard_group=model.hadamard_group,
        keep_blocks=model.keep_blocks,
        torch_threads=plan.job.worker.torch_threads,
        options=plan.job.storage.options,
        text="inline" if plan.job.text == "inline" else "precomputed",
        text_cache=open_text_store(plan.job),
        recipe=plan.recipe,
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
