"""Plan: all that rendering a request will do, decided before any device is touched. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ltx_batch.errors import InvalidRow
from ltx_batch.model.pipeline_config import PipelineConfig, check_sigmas
from ltx_batch.model.sigmas import SchedulerConfig, make_sigmas
from ltx_batch.request import RenderRequest

# Every released LTX VAE: pixels a latent has a side, frames a latent (after the first frame, which has its own).
SPATIAL = 32
TEMPORAL = 8


@dataclass(frozen=True, slots=True)
class Guidance:
    """How the transformer is asked at one step. A scale of 1 needs no negative prompt."""

    guidance_scale: float = 1.0

    @property
    def rows(self) -> int:
        """Rows of the transformer's batch for each clip."""
        return 2 if self.guidance_scale > 1 else 1


@dataclass(frozen=True, slots=True)
class PassPlan:
    """One run of the denoise loop. Its name begins the names of its noise. Sizes in pixels and frames, padded."""

    name: str
    height: int
    width: int
    num_frames: int
    sigmas: tuple[float, ...]
    guidance: tuple[Guidance, ...]

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
class Plan:
    """What a request will do. The clip is decoded at the last pass's size and cropped to the target."""

    passes: tuple[PassPlan, ...]
    target: Target
    frame_rate: float
    image_cond_noise_scale: float
    decode_timestep: float
    decode_noise_scale: float

    @property
    def needs_negative(self) -> bool:
        return any(guidance.rows > 1 for one in self.passes for guidance in one.guidance)


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
    height, width, num_frames = target.padded_height, target.padded_width, target.padded_frames
    frames, rows, columns = latent_size(num_frames, height, width)
    sigmas = _sigmas(request, config, scheduler, tokens=frames * rows * columns)
    guidance = tuple(Guidance(_or(request.guidance_scale, config.scale_at(config.guidance_scale, s))) for s in sigmas)
    decode_timestep = _or(request.decode_timestep, config.decode_timestep)
    default_noise = decode_timestep if config.decode_noise_scale is None else config.decode_noise_scale
    return Plan(
        passes=(PassPlan("pass1", height, width, num_frames, sigmas, guidance),),
        target=target,
        frame_rate=request.frame_rate,
        image_cond_noise_scale=_or(request.image_cond_noise_scale, config.image_cond_noise_scale),
        decode_timestep=decode_timestep,
        decode_noise_scale=_or(request.decode_noise_scale, default_noise),
    )


def check_request(request: RenderRequest) -> None:
    """Raises InvalidRow with the first broken rule."""
    if not request.prompt.strip():
        raise InvalidRow("prompt is empty")
    for name in ("height", "width", "num_frames", "frame_rate"):
        if getattr(request, name) <= 0:
            raise InvalidRow(f"{name} must be above 0, found {getattr(request, name)}")
    if request.timesteps is not None:
        try:
            check_sigmas(request.timesteps)
        except ValueError as error:
            raise InvalidRow(str(error)) from None
    if request.num_inference_steps is not None and request.num_inference_steps < 1:
        raise InvalidRow(f"num_inference_steps must be at least 1, found {request.num_inference_steps}")
    if (request.stg_scale or 0) > 0:
        raise InvalidRow("spatio-temporal guidance is not built yet: leave stg_scale out, or set it to 0")
    if request.input_media is not None:
        raise InvalidRow("input_media (video to video) is not built yet: use conditions")
    for condition in request.conditions:
        if not 0 <= condition.start_frame < request.num_frames:
            raise InvalidRow(
                f"a condition starts at frame {condition.start_frame}; the clip has frames 0 to {request.num_frames - 1}"
            )
        if not 0 <= condition.strength <= 1:
            raise InvalidRow(f"a condition's strength must be in 0..1, found {condition.strength}")


def _sigmas(
    request: RenderRequest, config: PipelineConfig, scheduler: SchedulerConfig, *, tokens: int
) -> tuple[float, ...]:
    """The row's timesteps, else its steps, else the config's timesteps, else its steps."""
    if request.timesteps is not None:
        return tuple(request.timesteps)
    if request.num_inference_steps is None and config.timesteps is not None:
        return config.timesteps
    steps = request.num_inference_steps or config.num_inference_steps
    return make_sigmas(config.sampler, steps, tokens, scheduler)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
