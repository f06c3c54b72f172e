"""Plan: all that rendering a request will do, decided before any device is touched. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ltx_batch.errors import InvalidRow
from ltx_batch.model.pipeline_config import PassConfig, PipelineConfig, check_sigmas
from ltx_batch.model.sigmas import SchedulerConfig, make_sigmas
from ltx_batch.request import RenderRequest

# Every released LTX VAE: pixels a latent has a side, frames a latent (after the first frame, which has its own).
SPATIAL = 32
TEMPORAL = 8


@dataclass(frozen=True, slots=True)
class Guidance:
    """How the transformer is asked at one step, and how its answers are blended.

    A `guidance_scale` above 1 asks for the negative prompt too, an `stg_scale` above 0 once more for the prompt, with
    attention disturbed in `skip_blocks`. `rescaling_scale` below 1 pulls the blend back to the deviation of the plain answer.
    """

    guidance_scale: float = 1.0
    stg_scale: float = 0.0
    rescaling_scale: float = 1.0
    cfg_star_rescale: bool = False
    skip_blocks: tuple[int, ...] = ()

    @property
    def negative(self) -> bool:
        return self.guidance_scale > 1

    @property
    def perturbed(self) -> bool:
        return self.stg_scale > 0

    @property
    def rows(self) -> int:
        """Rows of the transformer's batch for each clip."""
        return 1 + self.negative + self.perturbed


@dataclass(frozen=True, slots=True)
class PassPlan:
    """One run of the denoise loop. Its name begins the names of its noise. Sizes in pixels and frames, padded."""

    name: str
    height: int
    width: int
    num_frames: int
    sigmas: tuple[float, ...]
    guidance: tuple[Guidance, ...]
    stg_mode: str = "attention_values"
    stochastic_sampling: bool = False

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the latents."""
        return latent_size(self.num_frames, self.height, self.width)

    @property
    def tokens(self) -> int:
        frames, height, width = self.latent_size
        return frames * height * width

    @property
    def calls(self) -> int:
        """Calls of the transformer."""
        return len(self.sigmas)

    @property
    def row_forwards(self) -> int:
        """Rows of all calls for one clip: what the calls cost."""
        return sum(guidance.rows for guidance in self.guidance)


@dataclass(frozen=True, slots=True)
class Target:
    """The clip that is asked for, in pixels and frames, and its padded size: multiples of 32, and 8k + 1 frames."""

    height: int
    width: int
    num_frames: int

    @property
    def padded_height(self) -> int:
        return pad_size(self.height)

    @property
    def padded_width(self) -> int:
        return pad_size(self.width)

    @property
    def padded_frames(self) -> int:
        return pad_frames(self.num_frames)

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """Pixels at the left, right, top and bottom; an odd pad has its extra pixel at the right or the bottom.

        LTX-Video, ltx_video/inference.py, calculate_padding.
        """
        across, down = self.padded_width - self.width, self.padded_height - self.height
        return across // 2, across - across // 2, down // 2, down - down // 2


@dataclass(frozen=True, slots=True)
class Doubt:
    """What can be rendered and is hardly meant so. `columns` as of InvalidRow."""

    columns: tuple[str, ...]
    rule: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request will do. The clip is decoded at the last pass's size, brought to the target's padded size and cropped."""

    passes: tuple[PassPlan, ...]
    target: Target
    frame_rate: float
    image_cond_noise_scale: float
    decode_timestep: float
    decode_noise_scale: float
    tone_map_compression_ratio: float = 0.0
    doubts: tuple[Doubt, ...] = ()

    @property
    def needs_negative(self) -> bool:
        return any(guidance.negative for one in self.passes for guidance in one.guidance)


def latent_size(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    return (num_frames - 1) // TEMPORAL + 1, height // SPATIAL, width // SPATIAL


def pad_size(pixels: int) -> int:
    """The next multiple of 32; LTX-Video, ltx_video/inference.py."""
    return ((pixels - 1) // SPATIAL + 1) * SPATIAL


def pad_frames(num_frames: int) -> int:
    """The next 8k + 1; LTX-Video, ltx_video/inference.py."""
    return ((num_frames - 2) // TEMPORAL + 1) * TEMPORAL + 1


def plan_request(request: RenderRequest, config: PipelineConfig, scheduler: SchedulerConfig) -> Plan:
    """Fill every None of `request` from `config` and lay out its passes.

    Raises InvalidRow for what only the model knows to be wrong.
    """
    check_request(request)
    target = Target(request.height, request.width, request.num_frames)
    sizes = _pass_sizes(target, config)
    passes = tuple(
        _plan_pass(f"pass{number}", size, target.padded_frames, request, one, config, scheduler)
        for number, (size, one) in enumerate(zip(sizes, config.passes, strict=True), start=1)
    )
    _check_start(request, passes[0], config.passes[0])
    decode_timestep = _or(request.decode_timestep, config.decode_timestep)
    default_noise = decode_timestep if config.decode_noise_scale is None else config.decode_noise_scale
    return Plan(
        passes=passes,
        target=target,
        frame_rate=request.frame_rate,
        image_cond_noise_scale=_or(request.image_cond_noise_scale, config.image_cond_noise_scale),
        decode_timestep=decode_timestep,
        decode_noise_scale=_or(request.decode_noise_scale, default_noise),
        tone_map_compression_ratio=config.passes[-1].tone_map_compression_ratio,
        doubts=tuple(_doubts(request, passes[0])),
    )


def _pass_sizes(target: Target, config: PipelineConfig) -> list[tuple[int, int]]:
    """Height and width of each pass. A second pass is twice the first, which is rounded down to the latents' grid.

    pipeline_ltx_video.py, LTXMultiScalePipeline.
    """
    height, width = target.padded_height, target.padded_width
    if config.pipeline_type == "base":
        return [(height, width)]
    low = tuple(int(side * config.downscale_factor) // SPATIAL * SPATIAL for side in (height, width))
    if 0 in low:
        least = math.ceil(SPATIAL / config.downscale_factor)
        raise InvalidRow(
            f"{target.width}x{target.height} is too small for a multi-scale pipeline: its first pass runs at "
            f"{config.downscale_factor:.3g} of the size; take at least {pad_size(least)}x{pad_size(least)}",
            columns=[name for name, side in zip(("height", "width"), low, strict=True) if side == 0],
        )
    return [(low[0], low[1]), (2 * low[0], 2 * low[1])]


def _plan_pass(
    name: str,
    size: tuple[int, int],
    num_frames: int,
    request: RenderRequest,
    one: PassConfig,
    config: PipelineConfig,
    scheduler: SchedulerConfig,
) -> PassPlan:
    frames, rows, columns = latent_size(num_frames, *size)
    sigmas = _sigmas(request, one, config, scheduler, tokens=frames * rows * columns)
    return PassPlan(
        name=name,
        height=size[0],
        width=size[1],
        num_frames=num_frames,
        sigmas=sigmas,
        guidance=_guidances(request.guidance_scale, request.stg_scale, one, sigmas),
        stg_mode=config.stg_mode,
        stochastic_sampling=config.stochastic_sampling,
    )


@lru_cache(maxsize=256)  # rows differ in size more often than in these
def _guidances(
    guidance_scale: float | None, stg_scale: float | None, one: PassConfig, sigmas: tuple[float, ...]
) -> tuple[Guidance, ...]:
    """One for each step; steps at one entry of the tables share it."""
    entries = [one.entry_at(sigma) for sigma in sigmas]
    distinct = dict(zip(entries, sigmas, strict=True))
    made = {entry: _guidance(guidance_scale, stg_scale, one, sigma) for entry, sigma in distinct.items()}
    return tuple(made[entry] for entry in entries)


def _guidance(guidance_scale: float | None, stg_scale: float | None, one: PassConfig, sigma: float) -> Guidance:
    stg_scale = _or(stg_scale, one.scale_at(one.stg_scale, sigma))
    if stg_scale > 0 and one.skip_block_list is None:
        raise InvalidRow(
            "stg_scale above 0 needs skip_block_list in the pipeline config: which blocks to perturb",
            columns=("stg_scale",),
        )
    return Guidance(
        guidance_scale=_or(guidance_scale, one.scale_at(one.guidance_scale, sigma)),
        stg_scale=stg_scale,
        rescaling_scale=one.scale_at(one.rescaling_scale, sigma),
        cfg_star_rescale=one.cfg_star_rescale,
        skip_blocks=one.blocks_at(sigma),
    )


def check_request(request: RenderRequest) -> None:
    """Raises InvalidRow with the first broken rule."""
    if not request.prompt.strip():
        raise InvalidRow("prompt is empty", columns=("prompt",))
    for name in ("height", "width", "num_frames", "frame_rate"):
        if getattr(request, name) <= 0:
            raise InvalidRow(f"{name} must be above 0, found {getattr(request, name)}", columns=(name,))
    if request.timesteps is not None:
        try:
            check_sigmas(request.timesteps)
        except ValueError as error:
            raise InvalidRow(str(error), columns=("timesteps",)) from None
        if request.num_inference_steps is not None:
            raise InvalidRow(
                "num_inference_steps and timesteps exclude each other: the timesteps are the steps",
                columns=("num_inference_steps", "timesteps"),
            )
    if request.num_inference_steps is not None and request.num_inference_steps < 1:
        raise InvalidRow(
            f"num_inference_steps must be at least 1, found {request.num_inference_steps}",
            columns=("num_inference_steps",),
        )
    for condition in request.conditions:
        if not 0 <= condition.start_frame < request.num_frames:
            raise InvalidRow(
                f"a condition starts at frame {condition.start_frame}; the clip has frames 0 to {request.num_frames - 1}",
                columns=("conditioning_start_frames",),
            )
        if not 0 <= condition.strength <= 1:
            raise InvalidRow(
                f"a condition's strength must be in 0..1, found {condition.strength}",
                columns=("conditioning_strengths",),
            )


def _sigmas(
    request: RenderRequest, one: PassConfig, config: PipelineConfig, scheduler: SchedulerConfig, *, tokens: int
) -> tuple[float, ...]:
    """The row's timesteps, else its steps, else the config's timesteps, else its steps.

    Steps that are skipped are cut from a schedule that was made, never from one that was given; pipeline_ltx_video.py,
    retrieve_timesteps.
    """
    multi_scale = config.pipeline_type == "multi-scale"
    if request.timesteps is not None:
        if multi_scale:
            raise InvalidRow(
                "timesteps of a row cannot serve both passes of a multi-scale pipeline: set them in its config",
                columns=("timesteps",),
            )
        return _allowed(request.timesteps, scheduler, "timesteps")
    if one.timesteps is not None and (request.num_inference_steps is None or multi_scale):
        if request.num_inference_steps is not None:
            raise InvalidRow(
                "num_inference_steps of a row cannot replace the timesteps of a multi-scale pipeline's passes",
                columns=("num_inference_steps",),
            )
        return _allowed(one.timesteps, scheduler, "timesteps")
    steps = request.num_inference_steps or one.num_inference_steps
    first, last = one.skip_initial_inference_steps, one.skip_final_inference_steps
    if first + last >= steps:
        raise InvalidRow(
            f"num_inference_steps {steps}: {first} at the start and {last} at the end are skipped, so none is left",
            columns=("num_inference_steps",),
        )
    sigmas = make_sigmas(config.sampler, steps, tokens, scheduler)[first : steps - last]
    return _allowed(sigmas, scheduler, "num_inference_steps")


def _allowed(sigmas: tuple[float, ...], scheduler: SchedulerConfig, column: str) -> tuple[float, ...]:
    """`column` is where they come from. Compared to four digits, as the official pipeline does, whose configs give no more."""
    allowed = scheduler.allowed_inference_steps
    foreign = [] if allowed is None else [s for s in sigmas if round(float(np.float32(s)), 4) not in allowed]
    if foreign:
        raise InvalidRow(
            f"this checkpoint was distilled for the timesteps {', '.join(f'{s:g}' for s in allowed or ())} alone, found {foreign[0]:g}",
            columns=(column,),
        )
    return sigmas


def _check_start(request: RenderRequest, first: PassPlan, config: PassConfig) -> None:
    """pipeline_ltx_video.py, prepare_latents and __call__, assert the same."""
    if request.input_media is not None and first.sigmas[0] >= 1:
        raise InvalidRow(
            "input_media would be drowned in noise: the first timestep is 1. Begin lower, with "
            "skip_initial_inference_steps or timesteps",
            columns=("input_media_path",),
        )
    if request.input_media is None and config.skip_initial_inference_steps and first.sigmas[0] < 1:
        raise InvalidRow(
            "skip_initial_inference_steps needs input_media (video to video) to begin from",
            columns=("input_media_path",),
        )


def _doubts(request: RenderRequest, first: PassPlan) -> Iterator[Doubt]:
    if request.input_media is None and first.sigmas[0] < 1:
        yield Doubt(
            ("timesteps",),
            f"the first timestep is {first.sigmas[0]:g} and there is no input_media: pure noise is taken for a clip that is "
            "partly clean already; begin at 1",
        )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
