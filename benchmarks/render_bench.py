"""What the measurements of whole renders share: pipelines of random weights, limits, and what a render took."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.device_memory import DriverMemory
from benchmarks.random_model import random_parts
from ltx_batch import RenderRequest
from ltx_batch.model.device import give_back, limit_memory, room
from ltx_batch.model.guests import Guest
from ltx_batch.model.pipeline import LtxPipeline
from ltx_batch.model.pipeline_config import PipelineConfig, load_pipeline_config
from ltx_batch.model.quantize.policy import Precision
from ltx_batch.model.quantize.stored import Stored
from ltx_batch.model.quantize.swap import quantize_model
from ltx_batch.renderer import LtxRenderer

GIB = 2**30
CPU = torch.device("cpu")
PRESETS = {"2b": "ltxv-2b-0.9.8-distilled", "13b": "ltxv-13b-0.9.8-distilled", "tiny": "ltxv-13b-0.9.8-distilled"}
PROMPT_TOKENS = 40
Size = tuple[int, int, int]  # height, width, frames


class Embeddings:
    """In place of a text cache: random embeddings for every prompt, so that a render begins from embeddings."""

    uri = "random"

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        self._tokens = torch.randn(PROMPT_TOKENS, channels, generator=torch.Generator().manual_seed(0)).to(dtype)

    def get(self, text: str) -> torch.Tensor:
        return self._tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians of renders: seconds in all and by stage; bytes that torch had in use on the first GPU at most, and bytes of
    the whole process as the driver counts them, by GPU, the most of all renders and of the warm-up before them; how often,
    in a render, torch gave all free memory back to the driver since none of it was a gap large enough."""

    seconds: float
    stages: dict[str, float]
    allocated_bytes: int
    driver_bytes: list[int]
    alloc_retries: float
    ran: dict[str, Any]

    def told(self) -> dict[str, Any]:
        """For a figure."""
        placement = self.ran["placement"]
        return {
            "seconds": round(self.seconds, 3),
            "stages_s": {name: round(seconds, 3) for name, seconds in self.stages.items()},
            "allocated_gib": round(self.allocated_bytes / GIB, 2),
            "driver_gib": [round(count / GIB, 2) for count in self.driver_bytes],
            "alloc_retries": self.alloc_retries,
            "predicted_gib": round(placement["predicted_peak_bytes"] / GIB, 2),
            "placement": placement["mode"],
            "kept_blocks": placement["kept_blocks"],
            "chunk_tokens": placement["chunk_tokens"],
            "tiling": self.ran["tiling"],
            "attention": self.ran["attention"],
            "out_of_memory": self.ran.get("out_of_memory", []),
        }


@dataclass(slots=True)
class Subject:
    """A pipeline under measurement: `whole` renders the preset, `short` one step of each pass, which warms up every shape."""

    pipeline: LtxPipeline
    config: PipelineConfig
    driver: DriverMemory
    numbered: bool = False  # a prompt of its own for each render, which no memory of embeddings holds
    renders: int = 0

    def render(self, size: Size, *, short: bool = False) -> Any:
        height, width, frames = size
        self.renders += 1
        prompt = f"a red circle moves right{f', {self.renders}' if self.numbered else ''}"
        request = RenderRequest(prompt=prompt, height=height, width=width, num_frames=frames, seed=1)
        clip = LtxRenderer(self.pipeline, shortened(self.config) if short else self.config).render([request])[0]
        assert clip.frames.shape == (frames, height, width, 3), clip.frames.shape
        return clip

    def measure(self, size: Size, rounds: int, *, warm_up: bool = True, short: bool = False) -> Measured:
        clips, times = [], []
        with self.driver.watched():
            if warm_up:
                self.render(size, short=True)
            retries = alloc_retries(self.pipeline.device)
            for _ in range(rounds):
                started_s = time.perf_counter()
                clips.append(self.render(size, short=short))
                times.append(time.perf_counter() - started_s)
        retries = (alloc_retries(self.pipeline.device) - retries) / rounds
        stages = {name: median(clip.timings[name] for clip in clips) for name in clips[0].timings}
        most = max(clip.peak_bytes or 0 for clip in clips)
        return Measured(median(times), stages, most, list(self.driver.peaks), retries, clips[-1].ran)

    def hold_to(self, memory_gib: float) -> None:
        """Go on within so much of each GPU, context included, as a process that began with this limit."""
        device, placing = self.pipeline.device, self.pipeline.placing
        self.pipeline.lodging.leave()
        self.pipeline._graphs.drop()
        limit_memory(device, memory_gib)
        placing._placements.clear()
        if device.type == "cpu":  # where nothing but the pipeline's own word limits it
            placing._room = partial(room, device, memory_gib)

    def close(self) -> None:
        device = self.pipeline.device
        self.pipeline.close()
        give_back(device)


def alloc_retries(device: torch.device) -> int:
    return int(torch.cuda.memory_stats(device)["num_alloc_retries"]) if device.type == "cuda" else 0


def copy_rate_gb_s(device: torch.device) -> float:
    """Of page-locked host memory to the device: the best of five copies of 1 GiB."""
    module = nn.Module()
    module.register_buffer("bytes", torch.ones(GIB, dtype=torch.uint8))
    there, seconds = Guest(module, device), []
    for _ in range(5):
        started_s = time.perf_counter()
        there.come()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started_s)
        there.leave()
    return GIB / min(seconds) / 1e9


def make_subject(
    name: str,
    policy: Precision,
    device: torch.device,
    driver: DriverMemory,
    *,
    at_home: bool = True,
    text: Any = None,
    **how: Any,
) -> Subject:
    """`name` as of `random_parts`. Parts begin on the device, or else in host memory. Without `text` renders begin from
    embeddings. `how` goes to the pipeline: `placement`, `memory_gib`."""
    dtype = getattr(torch, policy.dtype)
    parts = replace(random_parts(name, dtype, device), text=text)
    quantize_model(parts.transformer, policy, device)
    if policy.quantize is not None:
        parts = replace(parts, stored=Stored.of(policy, {}))
    home = device if at_home else CPU
    for part in (parts.transformer, parts.vae, parts.latent_upsampler):
        part.to(home)
    give_back(device)
    if (limit_gib := how.get("memory_gib")) is not None:
        limit_memory(device, limit_gib)
    cache = Embeddings(parts.transformer.config.caption_channels, dtype) if text is None else None
    pipeline = LtxPipeline(parts, policy, device, home=home, text_cache=cache, **how)  # type: ignore[arg-type]
    return Subject(pipeline, load_pipeline_config(PRESETS[name]), driver, numbered=text is not None)


def shortened(config: PipelineConfig) -> PipelineConfig:
    """The same with the first timestep of each pass alone."""
    passes = {
        name: one.model_copy(update={"timesteps": one.timesteps[:1]})
        for name in ("first_pass", "second_pass")
        if (one := getattr(config, name)) is not None and one.timesteps is not None
    }
    return config.model_copy(update=passes)
