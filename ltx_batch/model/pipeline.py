"""The pipeline: text, conditions, denoise, decode, for a batch of rows that share a plan."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, NoReturn, TypeVar

import torch

from ltx_batch.errors import CheckpointError, NotFinite
from ltx_batch.model.attention import use_kernel
from ltx_batch.model.checkpoint import Checkpoint
from ltx_batch.model.chunks import in_chunks
from ltx_batch.model.conditioning import encode_media, in_tiles, start_tokens
from ltx_batch.model.decode import decode_row
from ltx_batch.model.denoise import denoise_pass
from ltx_batch.model.device import device_name, give_back, gpus, room
from ltx_batch.model.graphs import StepGraphs
from ltx_batch.model.guests import Streamed
from ltx_batch.model.latents import from_tokens
from ltx_batch.model.lodging import Lodging
from ltx_batch.model.lora import LoraSwitch
from ltx_batch.model.measure import measure, weights_bytes
from ltx_batch.model.memory import Work
from ltx_batch.model.noise import Noise
from ltx_batch.model.pipeline_config import PipelineConfig
from ltx_batch.model.placement import Placement, Room
from ltx_batch.model.placing import Placing
from ltx_batch.model.plan import PassPlan, Plan
from ltx_batch.model.preprocess import ConditionItem
from ltx_batch.model.quantize.apply import apply_policy
from ltx_batch.model.quantize.policy import Precision
from ltx_batch.model.quantize.text_rows import text_kept
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
    """Seconds by stage; a GPU is waited for at the end of each stage, and nowhere else. `at` is the last that began."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    at: str = ""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.at = name
        started_s = time.perf_counter()
        try:
            yield
        finally:  # a try that runs out of memory takes its time too
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
        placement: str = "auto",
        home: torch.device | None = None,
        memory_gib: float | None = None,
        attention: str = "auto",
        unquantised: Callable[[], Any] | None = None,
        text_missed: CheckpointError | None = None,
        text_cache: TextCache | None = None,
        text_precision: str = "auto",
    ) -> None:
        """Takes `parts` over: they are quantised as `policy` says and lie in `home`, by default on the device, until the
        first plan and `placement` decide how they live. `memory_gib` is what may be used of the device. `unquantised`
        loads the transformer as it was before, into host memory. `text_missed` is what to raise when parts have no text
        encoder and one is asked for; `text_precision` is then what made the embeddings."""
        if policy.name == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 in the VAE's convolutions too
        home = home or device
        quantized = apply_policy(parts.transformer, parts.vae, policy, device, home=home, stored=parts.stored)
        self.device = device
        self._load_unquantised = unquantised
        self.scheduler: SchedulerConfig = parts.scheduler
        self._causal, self._timestep_scale = parts.causal_positions, parts.timestep_scale
        self.transformer, self.vae = parts.transformer.to(home), parts.vae.to(home)
        self.latent_upsampler = None if parts.latent_upsampler is None else parts.latent_upsampler.to(home)
        self.attention = use_kernel(self.transformer, attention)
        self.lodging = Lodging(device, self.transformer, self.vae, self.latent_upsampler)
        self.loras = LoraSwitch(self.transformer, device, changing=self.lodging.changing_layers)
        self._graphs = StepGraphs(device, recordable=policy.name != "bnb-int8")
        self._memory_gib = memory_gib
        sizes = measure(self.transformer, self.vae, self.latent_upsampler, policy.name)
        self.placing = Placing(
            sizes,
            placement,
            device,
            room=self._room,
            mode=lambda: self.lodging.mode,
            relieve=self._graphs.give_up,
        )
        modules = {"transformer": self.transformer, "vae": self.vae, "latent_upsampler": self.latent_upsampler}
        self.weights_bytes: Mapping[str, int] = {name: weights_bytes(part) for name, part in modules.items() if part}
        self.turns: Turns | None = None
        if parts.text is not None:
            size = parts.text.weights_bytes
            self.weights_bytes |= {"text_encoder": size}
            load, relieve = partial(TextEncoder.load, parts.text), self._graphs.give_up
            movable = placement in ("auto", "offload")
            self.turns = Turns(device, load, size, self.lodging, movable=movable, relieve=relieve)
        missed = None if text_missed is None else partial(_missed, text_missed)
        self.text = TextSource(device, encode=missed if self.turns is None else self.turns.encode, cache=text_cache)
        self.ran: dict[str, Any] = {
            "precision": policy.name,
            "device": device_name(device),
            "dtype": policy.dtype,
            "attention": "native",
            "tiling": False,
            "degraded": False,
            **quantized,
        }
        if parts.text is not None:
            self.ran["text_precision"] = parts.text.precision
        elif text_precision != "auto":  # of embeddings that another process made
            self.ran["text_precision"] = text_precision

    def check(self, config: PipelineConfig) -> None:
        """Raises CheckpointError where this model cannot do what the config asks for."""
        if config.pipeline_type == "multi-scale" and self.latent_upsampler is None:
            raise CheckpointError(
                "the pipeline config is multi-scale, which takes a latent upsampler, and the checkpoint has none: "
                "name one as model.upsampler, or use a base pipeline"
            )
        if fault := config.blocks_fault(len(self.transformer.transformer_blocks)):
            raise CheckpointError(fault)

    @torch.inference_mode()
    def encode(self, text: str, *, negative: bool = False) -> Text:
        return self.text.encode(text, negative=negative)

    @torch.inference_mode()
    def render(
        self, plan: Plan, rows: Sequence[Row], watch: Stopwatch, finish: Callable[[Iterable[torch.Tensor]], Frames]
    ) -> Rendered[Frames]:
        """`finish` makes a row's frames of its video, which comes in pieces, fp32 [1, 3, f, H, W] in [-1, 1], before the
        next one is decoded.

        A stage that runs out of memory is done again, thriftier, from the latents of the stages before it. Raises
        NotFinite where latents are not finite.
        """
        work = self._work(plan, rows)
        with watch.stage("text"):
            self._make_room(work)
        latents: list[torch.Tensor] = []
        with text_kept(self.transformer):
            for one in plan.passes:
                attempt = partial(self._pass, one, plan, rows, watch, latents[-1] if latents else None)
                latents.append(self.placing.attempt(work, lambda: watch.at, attempt))
                if not torch.isfinite(latents[-1]).all():
                    raise NotFinite(f"the latents are not finite after {one.name}; {self._advice()}")
        frames = [
            self.placing.attempt(work, lambda: watch.at, partial(self._decode, found, plan, row, watch, finish))
            for found, row in zip(latents[-1].split(1), rows, strict=True)
        ]
        self._tell(self.placing.placement(work))
        return Rendered(tuple(latents), tuple(frames))

    @contextmanager
    def unquantised(self) -> Iterator[None]:
        """Within it, the transformer's layers are not quantised: it is loaded anew, streamed from host memory, and given
        back at the end. Raises NotFinite where the transformer is not quantised, or not to be had otherwise."""
        if self._load_unquantised is None:
            raise NotFinite(f"there is no other precision to render in; {self._advice()}")
        usual = self.transformer, self.attention, self.loras, self.ran
        self.transformer = self._load_unquantised()
        streamed = Streamed(self.transformer, list(self.transformer.transformer_blocks), self.device)
        self.attention = use_kernel(self.transformer, self.attention.asked)
        self.loras = LoraSwitch(self.transformer, self.device, changing=streamed.changing_layers)
        self.ran = {**self.ran, "unquantised": True}
        try:
            with self.lodging.in_its_place(streamed):
                yield
        finally:
            streamed.detach()
            self.transformer, self.attention, self.loras, self.ran = usual

    def text_told(self) -> dict[str, Any]:
        """Where the embeddings came from since this was last asked, and where the encoder is and why."""
        return {**self.text.taken(), "place": "no text encoder" if self.turns is None else self.turns.tell()}

    def _make_room(self, work: Work) -> None:
        """The text encoder has done its part: it leaves the device where the others want its place."""
        placement = self.placing.placement(work)
        if self.turns is not None:
            self.turns.let_others_work(placement.peak_bytes)

    def _room(self) -> Room:
        """What all parts together may use, of each GPU."""
        text, first = self._text_bytes, gpus(self.device)[0]
        return room(
            self.device, self._memory_gib, lambda gpu: self.lodging.held_on(gpu) + (text if gpu == first else 0)
        )

    @property
    def _text_bytes(self) -> int:
        """What the text encoder takes of the device now."""
        return 0 if self.turns is None else self.turns.held_bytes

    def _pass(
        self,
        one: PassPlan,
        plan: Plan,
        rows: Sequence[Row],
        watch: Stopwatch,
        before: torch.Tensor | None,
        placement: Placement,
    ) -> torch.Tensor:
        self.lodging.settle(placement)
        begin = (
            self._begin(one, plan, rows, watch, placement) if before is None else self._raise(before, watch, placement)
        )
        return self.run_pass(one, plan, rows, watch, begin=begin, placement=placement)

    def _begin(
        self, first: PassPlan, plan: Plan, rows: Sequence[Row], watch: Stopwatch, placement: Placement
    ) -> torch.Tensor | None:
        """The latents that video to video begins from; a later pass goes on from the first pass's, not from these."""
        media = [row.media for row in rows if row.media is not None]
        if not media:
            return None
        with watch.stage("condition"), self._encoder_at_work(placement, plan.passes.index(first), rows):
            name = f"{first.name}.vae_sample.input_media"
            return encode_media(media, first, [row.noise for row in rows], name, self.vae, self.device)

    def _raise(self, latents: torch.Tensor, watch: Stopwatch, placement: Placement) -> torch.Tensor:
        with watch.stage("upsample"), self.lodging.at("upsample", placement):
            return upsample_latents(self.latent_upsampler, latents, self.vae)

    @torch.inference_mode()
    def run_pass(
        self,
        one: PassPlan,
        plan: Plan,
        rows: Sequence[Row],
        watch: Stopwatch,
        *,
        begin: torch.Tensor | None = None,
        placement: Placement | None = None,
    ) -> torch.Tensor:
        """One denoise pass of the plan, from noise or from `begin`: normalised latents fp32 [B, C, F, H, W]."""
        if placement is None:
            placement = self.placing.placement(self._work(plan, rows))
            self.lodging.settle(placement)
        number = plan.passes.index(one)
        noises = [row.noise for row in rows]
        with watch.stage("condition"), self._encoder_at_work(placement, number, rows):
            tokens = start_tokens(
                one,
                [row.conditions for row in rows],
                noises,
                self.vae,
                self.transformer.config.in_channels,
                plan.frame_rate,
                begin=begin,
                causal=self._causal,
                device=self.device,
            )
        with watch.stage("denoise"), self._transformer_at_work(placement, number, one, tokens.latents.shape):
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
                call=self._graphs,
            )
        return from_tokens(clean, one.latent_size)

    def _decode(
        self,
        latents: torch.Tensor,
        plan: Plan,
        row: Row,
        watch: Stopwatch,
        finish: Callable[[Iterable[torch.Tensor]], Frames],
        placement: Placement,
    ) -> Frames:
        self.lodging.settle(placement)
        with watch.stage("decode"), self.lodging.at("decode", placement):
            return finish(decode_row(self.vae, latents, plan, row.noise, placement.decode_slices))

    @contextmanager
    def _encoder_at_work(self, placement: Placement, number: int, rows: Sequence[Row]) -> Iterator[None]:
        """The VAE's encoder is at hand, if there is anything to encode."""
        if not any(row.conditions or row.media is not None for row in rows):
            yield
            return
        tiles = placement.encode_tiles[number] if placement.encode_tiles else None
        with self.lodging.at("condition", placement), in_tiles(self.vae, tiles):
            yield

    @contextmanager
    def _transformer_at_work(
        self, placement: Placement, number: int, one: PassPlan, shape: torch.Size
    ) -> Iterator[None]:
        """`shape` is that of the latents of all clips, [clips, tokens, channels]."""
        config = self.transformer.config
        clips, tokens, _ = shape
        # One clip's shape, whatever the batch: a kernel that hung on its neighbours would make other bits of the same row.
        rows = max(guidance.rows for guidance in one.guidance)
        heads = (rows, config.num_attention_heads, tokens, config.attention_head_dim)
        self.attention.choose(heads, self.transformer.dtype, self.device)
        chunk_tokens = placement.passes[number].chunk_tokens
        if self.lodging.mode != "resident":
            self._graphs.drop()  # what was recorded read weights where they no longer lie
        with (
            self.lodging.at("denoise", placement, number),
            in_chunks(self.transformer, chunk_tokens),
            self._graphs.at_work(
                self.transformer, clips * rows * tokens, spare_bytes=self._spare_bytes(placement, chunk_tokens)
            ),
        ):
            yield

    def _spare_bytes(self, placement: Placement, chunk_tokens: int | None) -> int | None:
        """Of the device, beside all that the placement foresees; None where the transformer does not stay on it whole."""
        here = self._room() if self.lodging.mode == "resident" and chunk_tokens is None else Room()
        return None if here.bytes is None else here.usable[0] - placement.peak_bytes - self._text_bytes

    def _tell(self, placement: Placement) -> None:
        peak_bytes = placement.peak_bytes if self.turns is None else self.turns.peak_bytes(placement.peak_bytes)
        self.ran |= {
            "attention": self.attention.taken(),
            "tiling": str(placement.decode_slices) if placement.decode_slices else False,
            "degraded": placement.degraded or "unquantised" in self.ran,
            "placement": {**placement.ran, "predicted_peak_bytes": peak_bytes},
        }
        if self.placing.told:
            self.ran["out_of_memory"] = list(self.placing.told)

    def close(self) -> None:
        """Give the memory back."""
        if self.turns is not None:
            self.turns.close()
        del self._graphs, self.transformer, self.loras, self.vae
        del self.text, self.latent_upsampler, self.lodging, self.placing
        gc.collect()
        give_back(self.device)

    def _work(self, plan: Plan, rows: Sequence[Row]) -> Work:
        media = [item.pixels for row in rows for item in row.conditions] + [
            row.media for row in rows if row.media is not None
        ]
        longest = max((pixels.shape[2] for pixels in media), default=0)
        conditioned = any(row.conditions for row in rows)
        return Work(plan, len(rows), longest, conditioned=conditioned, loras=bool(self.loras.ran))

    def _advice(self) -> str:
        if self.ran["precision"] in ("fp32", "bf16") or "unquantised" in self.ran:
            return "are the weights whole?"
        if self._load_unquantised is None:
            return "the checkpoint comes quantised: render this row from one that does not, with precision bf16"
        return "another attempt renders it without quantisation; where that is often, use precision bf16"


def _missed(error: CheckpointError, text: str) -> NoReturn:
    raise error
