"""`render`: one clip, no manifest."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ltx_batch.cli.conditions import Conditions, read_conditions
from ltx_batch.cli.options import AsJson
from ltx_batch.cli.output import duration, print_json, unwritable
from ltx_batch.errors import JobError, LtxBatchError, RowError, UsageError
from ltx_batch.torch_environment import prepare_torch

if TYPE_CHECKING:
    from ltx_batch.clip import Clip
    from ltx_batch.manifest.plans import Planner
    from ltx_batch.request import RenderRequest

_SUFFIXES = (".mp4", ".png")
# The demo model is trained on small clips; other checkpoints get the official defaults of RenderRequest.
_DEMO_SIZE: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 17, "frame_rate": 16.0}
_WORDS = {"prompt": "PROMPT", "loras": "--lora", "input_media_path": "--input-media"}


def render(
    prompt: Annotated[str, typer.Argument(help="What the clip shows.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="clip.mp4, or frame.png for one frame.")],
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            "--video",
            metavar="FILE[@FRAME[:STRENGTH]]",
            help="Picture or video that the clip shows from FRAME (0) on; STRENGTH 0 to 1 (1). Repeatable.",
        ),
    ] = None,
    conditioning_media_paths: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE...", help="The same as the official script has it: files, ..."),
    ] = None,
    conditioning_start_frames: Annotated[
        list[int] | None, typer.Option(metavar="FRAME...", help="... a frame for each, ...")
    ] = None,
    conditioning_strengths: Annotated[
        list[float] | None, typer.Option(metavar="STRENGTH...", help="... and, if not 1, a strength for each.")
    ] = None,
    input_media: Annotated[
        str | None,
        typer.Option(
            "--input-media", "--input-media-path", metavar="FILE", help="Video to video: begin from it, not from noise."
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames; 8k+1 wastes none.")] = None,
    frame_rate: Annotated[float | None, typer.Option(help="Hz.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same clip.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the clip does not show.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1: off. Default: the pipeline config's.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Default: the pipeline config's.")] = None,
    timesteps: Annotated[
        list[float] | None,
        typer.Option(metavar="T...", help="Falling, 1 is pure noise: 0.8 0.5 0.2. Default: the pipeline config's."),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="LoRA file and how much of it. Repeatable.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="demo, an official name, a folder, an official file, a URI or a hub id. Default: the pipeline config's, "
            "demo where none is named."
        ),
    ] = None,
    text_encoder: Annotated[str | None, typer.Option(help="For a checkpoint without one: folder, URI, hub id.")] = None,
    upsampler: Annotated[str | None, typer.Option(help="Spatial upscaler, for multi-scale pipelines.")] = None,
    pipeline_config: Annotated[str | None, typer.Option(help="A preset's name, or an official YAML.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, int8, int8-weight, fp8, bnb-int8.")] = "auto",
    text_precision: Annotated[str, typer.Option(help="The same, for the text encoder.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    placement: Annotated[str, typer.Option(help="auto, resident, offload, sharded.")] = "auto",
    attention: Annotated[str, typer.Option(help="auto, native, sage: the kernel of self-attention.")] = "auto",
    device_memory_gib: Annotated[float | None, typer.Option(help="Of the GPU that may be used.")] = None,
    as_json: AsJson = False,
) -> int:
    """Render one clip."""
    prepare_torch()
    checkpoint = checkpoint or _checkpoint_of(pipeline_config)
    conditions = read_conditions(
        image or (),
        {
            "conditioning_media_paths": conditioning_media_paths or (),
            "conditioning_start_frames": conditioning_start_frames or (),
            "conditioning_strengths": conditioning_strengths or (),
        },
    )
    row = {
        "prompt": prompt,
        "height": height,
        "width": width,
        "num_frames": 1 if num_frames is None and _is_picture(output) else num_frames,
        "frame_rate": frame_rate,
        "seed": seed,
        "negative_prompt": negative_prompt,
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "timesteps": timesteps or None,
        "loras": lora or None,
        "input_media_path": input_media,
        **conditions.columns,
    }
    options = {
        "text_encoder": text_encoder,
        "upsampler": upsampler,
        "pipeline_config": pipeline_config,
        "precision": precision,
        "text_precision": text_precision,
        "device": device,
        "placement": placement,
        "attention": attention,
        "device_memory_gib": device_memory_gib,
    }
    request = _checked(row, conditions, output, {"checkpoint": checkpoint, **options})
    started_s = time.monotonic()
    clip = _render(request, output, checkpoint, options)
    seconds = time.monotonic() - started_s
    if as_json:
        print_json(_facts(clip, request, output, seconds))
    else:
        frames, rows, columns, _ = clip.frames.shape
        print(f"{output}: {columns}x{rows}, {_counted(frames)} at {clip.frame_rate:g} Hz, in {duration(seconds)}")
    return 0


def _checkpoint_of(pipeline_config: str | None) -> str:
    """What a config names; empty where it names none, or cannot be read: both are told where a planner is looked for."""
    from ltx_batch.model.pipeline_config import load_pipeline_config

    if pipeline_config is None:
        return "demo"
    try:
        return load_pipeline_config(pipeline_config).checkpoint_path or ""
    except JobError:
        return ""


def _checked(row: Mapping[str, Any], conditions: Conditions, output: Path, named: Mapping[str, Any]) -> RenderRequest:
    """The request, its media read. Raises JobError with every wrong argument."""
    from ltx_batch.job import ModelSpec, RowDefaults
    from ltx_batch.manifest import resolve_single
    from ltx_batch.model.frames import load_media
    from ltx_batch.renderer import layers_of

    given = {name: value for name, value in row.items() if value is not None}
    faults = [*_output_faults(output, given.get("num_frames")), *conditions.faults, *_model_faults(named)]
    where = {name: named[name] for name in ("checkpoint", "pipeline_config")}
    request, broken = resolve_single(
        given,
        RowDefaults(**_DEMO_SIZE if named["checkpoint"] == "demo" else {}),
        layers=lambda: layers_of(ModelSpec(**where)),
        planner=_planner(**where, faults=faults),
    )
    for fault in broken:
        name = fault.column or ""
        faults.append(f"{conditions.typed(name) or _typed(name, given.get(name))}: {fault.rule}")
    if request is not None and not faults:
        try:
            return load_media(request)
        except RowError as error:
            faults.append(str(error))
    raise JobError("\n".join(faults))


def _model_faults(named: Mapping[str, Any]) -> list[str]:
    from pydantic import ValidationError

    from ltx_batch.job import ModelSpec

    try:
        ModelSpec(**named)
    except ValidationError as error:
        return [f"{_typed(str(one['loc'][0]), one['input'])}: {one['msg']}" for one in error.errors()]
    return []


def _planner(checkpoint: str, pipeline_config: str | None, faults: list[str]) -> Planner | None:
    """None, and a fault, where checkpoint or pipeline config cannot be used."""
    from ltx_batch.renderer import load_planner

    try:
        return load_planner(checkpoint, pipeline_config=pipeline_config)
    except UsageError as error:
        faults.append(str(error))
        return None


def _output_faults(output: Path, num_frames: int | None) -> list[str]:
    faults = []
    if output.suffix.lower() not in _SUFFIXES:
        faults.append(f"-o {output}: give a file that ends in {' or '.join(_SUFFIXES)}")
    if _is_picture(output) and num_frames not in (None, 1):
        faults.append(
            f"-o {output} holds one frame, not {num_frames}: leave --num-frames out, or give -o {output.stem}.mp4"
        )
    reason = "that is a folder, name a file in it" if output.is_dir() else unwritable(output)
    return faults + [f"-o {output}: {reason}"] * (reason is not None)


def _counted(frames: int) -> str:
    return f"{frames} frame{'' if frames == 1 else 's'}"


def _is_picture(output: Path) -> bool:
    return output.suffix.lower() == ".png"


def _typed(name: str, value: Any) -> str:
    """An option and its value, as they were typed."""
    words = value if isinstance(value, list) else [] if value is None else [value]
    return " ".join([_WORDS.get(name, f"--{name.replace('_', '-')}"), *map(str, words)]).rstrip()


def _render(request: RenderRequest, output: Path, checkpoint: str, options: Mapping[str, Any]) -> Clip:
    """Render and write. Raises RowError for what nobody foresaw, so that it counts as the failed render that it is."""
    from rich.console import Console

    from ltx_batch.renderer import load_renderer

    console = Console(stderr=True)
    try:
        with console.status("loading the model") as status:
            renderer = load_renderer(checkpoint, **options)
            try:
                status.update("rendering")
                clip = renderer.render([request])[0]
            finally:
                renderer.close()
        _save(clip, request, output)
        return clip
    except LtxBatchError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise RowError(f"the render failed with {type(error).__name__}: {error}") from error


def _save(clip: Clip, request: RenderRequest, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    from ltx_batch.job import VideoSpec
    from ltx_batch.media import write_clip

    write_clip(clip, output, VideoSpec(), metadata={"prompt": request.prompt, "seed": str(request.seed)})


def _facts(clip: Clip, request: RenderRequest, output: Path, seconds: float) -> dict[str, Any]:
    frames, height, width, _ = clip.frames.shape
    return {
        "output": str(output),
        "seed": request.seed,
        "height": height,
        "width": width,
        "num_frames": frames,
        "frame_rate": clip.frame_rate,
        "frames_sha256": clip.frames_sha256(),
        "seconds": round(seconds, 3),
        "timings": clip.timings,
        "ran": clip.ran,
    }
