"""The pipeline: text, conditions, denoise, decode, for a batch of rows that share a plan."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

import torch
from torch import nn

from ltx_batch.errors import CheckpointError
from ltx_batch.model.checkpoint import Checkpoint
from ltx_batch.model.conditioning import encode_media, start_tokens
from ltx_batch.model.decode import decode_row
from ltx_batch.model.denoise import denoise_pass
from ltx_batch.model.device import device_name
from ltx_batch.model.latents import from_tokens
from ltx_batch.model.lora import LoraSwitch
from ltx_batch.model.noise import Noise
from ltx_batch.model.pipeline_config import PipelineConfig
from ltx_batch.model.plan import PassPlan, Plan
from ltx_batch.model.preprocess import ConditionItem
from ltx_batch.model.quantize.bnb import quantize_blocks, scale_bytes
from ltx_batch.model.quantize.policy import Precision
from ltx_batch.model.room import working_bytes
from ltx_batch.model.sigmas import SchedulerConfig
from ltx_batch.model.text import Text, TextEncoder
from ltx_batch.model.text_cache import TextCache
from ltx_batch.model.text_source import TextSource
from ltx_batch.model.turns import Turns
from ltx_batch.model.upsample import upsample_latents

Frames = TypeVar("Frames")


@dataclass(frozen=True, slots=True)
class Row:
    """What differs from clip to clip of a batch. `negative` may be None where the plan needs none. `media` is what video to
    video begins from, pixels fp32 [1, 3, F, H, W] in [-1, 1] of the padded target, or None."""

    prompt: Text
    negative: Text | None
    conditions: tuple[ConditionItem, ...]
    noise: Noise
    media: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Rendered(Generic[Frames]):
    """Normalised latents of each pass, fp32 [B, C, F, H, W], and each row's frames."""

    latents: tuple[torch.Tensor, ...]
    frames: tuple[Frames, ...]


@dataclass(slots=True)
class Stopwatch:
    """Seconds by stage; a GPU is waited for at the end of each stage, and nowhere else."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started_s = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started_s


class LtxPipeline:
    """The loaded parts on one device. Its methods run under `torch.inference_mode`."""

    def __init__(
        self,
        parts: Checkpoint,
        policy: Precision,
        device: torch.device,
        *,
        text_missed: CheckpointError | None = None,
        text_cache: TextCache | None = None,
    ) -> None:
        """Takes `parts` over: they are quantised as `policy` says and moved to `device`, where they may lie already.
        `text_missed` is what to raise when parts have no text encoder and one is asked for."""
        if policy.name == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 in the VAE's convolutions too
        quantized: dict[str, Any] = {}
        if policy.quantize == "bnb-int8":
            quantized = quantize_blocks(parts.transformer, policy, device)
        self.device = device
        self.scheduler: SchedulerConfig = parts.scheduler
        self._causal, self._timestep_scale = parts.causal_positions, parts.timestep_scale
        self.transformer = parts.transformer.to(device)
        self.loras = LoraSwitch(self.transformer, device)
        self.vae = parts.vae.to(device)
        self.latent_upsampler = None if parts.latent_upsampler is None else parts.latent_upsampler.to(device)
        modules = {
            "transformer": self.transformer,
            "vae": self.vae,
            "latent_upsampler": self.latent_upsampler,
        }
        self.weights_bytes: Mapping[str, int] = {name: weights_bytes(part) for name, part in modules.items() if part}
        self.turns: Turns | None = None
        if parts.text is not None:
            self.weights_bytes |= {"text_encoder": parts.text.weights_bytes}
            others = [part for part in modules.values() if part is not None]
            load = partial(TextEncoder.load, parts.text)
            self.turns = Turns(device, load, parts.text.weights_bytes, others, movable=policy.quantize is None)
        encoder = None if text_missed is None else partial(_missed, text_missed)
        self.text = TextSource(device, encoder=encoder if self.turns is None else self.turns.encoder, cache=text_cache)
        self.ran = {
            "precision": policy.name,
            "device": device_name(device),
            "dtype": policy.dtype,
            "attention": "native",
            "tiling": False,
            "degraded": False,
            **quantized,
        }

    def check(self, config: PipelineConfig) -> None:
        """Raises CheckpointError where this model cannot do what the config asks for."""
        if config.pipeline_type == "multi-scale" and self.latent_upsampler is None:
            raise CheckpointError(
                "the pipeline config is multi-scale, which takes a latent upsampler, and the checkpoint has none: "
                "name one as model.upsampler, or use a base pipeline"
            )
        blocks = len(self.transformer.transformer_blocks)
        for one in config.passes:
            absent = sorted(block for block in one.blocks() if not 0 <= block < blocks)
            if absent:
                raise CheckpointError(
                    f"skip_block_list names block {absent[0]}, and this transformer has blocks 0 to {blocks - 1}: is the "
                    "pipeline config for another model?"
                )

    @torch.inference_mode()
    def encode(self, text: str, *, negative: bool = False) -> Text:
        return self.text.encode(text, negative=negative)

    @torch.inference_mode()
    def render(
        self, plan: Plan, rows: Sequence[Row], watch: Stopwatch, finish: Callable[[torch.Tensor], Frames]
    ) -> Rendered[Frames]:
        """`finish` makes a row's frames of its video, fp32 [1, 3, F, H, W] in [-1, 1], before the next one is decoded.

        Raises FloatingPointError where latents are not finite.
        """
        with watch.stage("text"):
            self._make_room(plan, len(rows))
        latents: list[torch.Tensor] = []
        for one in plan.passes:
            begin = self._begin(one, rows, watch) if not latents else self._raise(latents[-1], watch)
            latents.append(self.run_pass(one, plan, rows, watch, begin=begin))
            if not torch.isfinite(latents[-1]).all():
                raise FloatingPointError(f"the latents are not finite after {one.name}; {self._advice()}")
        with watch.stage("decode"):
            found = latents[-1].split(1)
            decoded = (decode_row(self.vae, one, plan, row.noise) for one, row in zip(found, rows, strict=True))
            return Rendered(tuple(latents), tuple(finish(video) for video in decoded))

    def text_told(self) -> dict[str, Any]:
        """Where the embeddings came from since this was last asked, and where the encoder is and why."""
        return {**self.text.taken(), "place": "no text encoder" if self.turns is None else self.turns.told}

    def _make_room(self, plan: Plan, rows: int) -> None:
        """The text encoder has done its part: it leaves the device where the others want its place."""
        if self.turns is not None:
            channels = self.transformer.config.num_attention_heads * self.transformer.config.attention_head_dim
            wanted = working_bytes(plan, rows=rows, channels=channels, number_bytes=self.transformer.dtype.itemsize)
            self.turns.let_others_work(wanted)

    def _begin(self, first: PassPlan, rows: Sequence[Row], watch: Stopwatch) -> torch.Tensor | None:
        """The latents that video to video begins from; a later pass goes on from the first pass's, not from these."""
        media = [row.media for row in rows if row.media is not None]
        if not media:
            return None
        with watch.stage("condition"):
            name = f"{first.name}.vae_sample.input_media"
            return encode_media(media, first, [row.noise for row in rows], name, self.vae)

    def _raise(self, latents: torch.Tensor, watch: Stopwatch) -> torch.Tensor:
        with watch.stage("upsample"):
            return upsample_latents(self.latent_upsampler, latents, self.vae)

    @torch.inference_mode()
    def run_pass(
        self, one: PassPlan, plan: Plan, rows: Sequence[Row], watch: Stopwatch, *, begin: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One denoise pass, from noise or from `begin`: normalised latents fp32 [B, C, F, H, W]."""
        noises = [row.noise for row in rows]
        with watch.stage("condition"):
            tokens = start_tokens(
                one,
                [row.conditions for row in rows],
                noises,
                self.vae,
                self.transformer.config.in_channels,
                plan.frame_rate,
                begin=begin,
                causal=self._causal,
            )
        with watch.stage("denoise"):
            prompt = Text.stack([row.prompt for row in rows])
            negative = Text.stack([row.negative for row in rows if row.negative]) if plan.needs_negative else None
            clean = denoise_pass(
                self.transformer,
                tokens,
                prompt,
                negative,
                one,
                noises,
                image_cond_noise_scale=plan.image_cond_noise_scale,
                timestep_scale=self._timestep_scale,
            )
        return from_tokens(clean, one.latent_size)

    def close(self) -> None:
        """Give the memory back."""
        if self.turns is not None:
            self.turns.close()
        del self.transformer, self.loras, self.vae, self.text, self.latent_upsampler
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _advice(self) -> str:
        if self.ran["precision"] == "bnb-int8":
            return "bitsandbytes computes in fp16, which overflows at 65504: use precision bf16, or skip_modules"
        return "are the weights whole?"


def _missed(error: CheckpointError) -> NoReturn:
    raise error


def weights_bytes(module: nn.Module) -> int:
    held = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held) + scale_bytes(module)
