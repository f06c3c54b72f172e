"""`render`: one clip, no manifest."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ltx_batch.cli.options import AsJson
from ltx_batch.cli.output import duration, print_json
from ltx_batch.errors import JobError

if TYPE_CHECKING:
    from ltx_batch.clip import Clip
    from ltx_batch.request import LoraRef, RenderRequest

_SUFFIXES = (".mp4", ".png")
# The demo model is trained on small clips; other checkpoints get the official defaults of RenderRequest.
_DEMO_SIZE: dict[str, Any] = {"height": 128, "width": 128, "num_frames": 17, "frame_rate": 16.0}


def render(
    prompt: Annotated[str, typer.Argument(help="What the clip shows.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="clip.mp4, or frame.png for one frame.")],
    image: Annotated[Path | None, typer.Option(help="The clip begins with this picture.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames; 8k+1 wastes none.")] = None,
    frame_rate: Annotated[float | None, typer.Option(help="Hz.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same clip.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the clip does not show.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1: off. Default: the pipeline config's.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Default: the pipeline config's.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="LoRA file and how much of it. Repeatable.")
    ] = None,
    checkpoint: Annotated[
        str, typer.Option(help="demo, an official name, a folder, an official file, a URI or a hub id.")
    ] = "demo",
    text_encoder: Annotated[str | None, typer.Option(help="For a checkpoint without one: folder, URI, hub id.")] = None,
    upsampler: Annotated[str | None, typer.Option(help="Spatial upscaler, for multi-scale pipelines.")] = None,
    pipeline_config: Annotated[str | None, typer.Option(help="A preset's name, or an official YAML.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, int8, int8-weight, fp8, bnb-int8.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    placement: Annotated[str, typer.Option(help="auto, resident, offload, sharded.")] = "auto",
    device_memory_gib: Annotated[float | None, typer.Option(help="Of the GPU that may be used.")] = None,
    as_json: AsJson = False,
) -> int:
    """Render one clip."""
    if output.suffix.lower() not in _SUFFIXES:
        raise JobError(f"{output}: give a file that ends in {' or '.join(_SUFFIXES)}")
    if output.suffix.lower() == ".png" and num_frames not in (None, 1):
        raise JobError(
            f"{output} holds one frame, not {num_frames}: leave --num-frames out, or give -o {output.stem}.mp4"
        )
    given: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "frame_rate": frame_rate,
        "seed": seed,
        "negative_prompt": negative_prompt,
        "guidance_scale": guidance_scale,
        "num_inference_steps": num_inference_steps,
        "loras": _loras(lora, checkpoint) if lora else None,
    }
    request = _request(prompt, image, output, given, _DEMO_SIZE if checkpoint == "demo" else {})
    started_s = time.monotonic()
    clip = _render(
        request,
        checkpoint,
        text_encoder=text_encoder,
        upsampler=upsampler,
        pipeline_config=pipeline_config,
        precision=precision,
        device=device,
        placement=placement,
        device_memory_gib=device_memory_gib,
    )
    _save(clip, request, output)
    seconds = time.monotonic() - started_s
    if as_json:
        print_json(_facts(clip, request, output, seconds))
    else:
        frames, rows, columns, _ = clip.frames.shape
        print(f"{output}: {columns}x{rows}, {frames} frames at {clip.frame_rate:g} Hz, in {duration(seconds)}")
    return 0


def _request(
    prompt: str, image: Path | None, output: Path, given: dict[str, Any], defaults: dict[str, Any]
) -> RenderRequest:
    from ltx_batch.request import Condition, RenderRequest

    if image is not None and not image.is_file():
        raise JobError(f"--image {image}: there is no such file")
    chosen = {name: value for name, value in given.items() if value is not None}
    if output.suffix.lower() == ".mp4" and any(chosen.get(name, 0) % 2 for name in ("height", "width")):
        raise JobError("height and width must be even: video is stored as yuv420p")
    one_frame = {"num_frames": 1} if output.suffix.lower() == ".png" else {}
    conditions = () if image is None else (Condition(image),)
    return RenderRequest(prompt=prompt, conditions=conditions, **{**defaults, **one_frame, **chosen})


def _loras(texts: list[str], checkpoint: str) -> tuple[LoraRef, ...]:
    """Raises JobError for a text that names no file and weight, CheckpointError for files that cannot be used."""
    from ltx_batch.job import ModelSpec
    from ltx_batch.manifest.loras import LoraLookup, check_files, loras_of
    from ltx_batch.renderer import layers_of

    try:
        loras = loras_of(texts, ".")
    except ValueError as error:
        raise JobError(f"--lora: {error}") from None
    check_files(loras, LoraLookup(None, lambda: layers_of(ModelSpec(checkpoint=checkpoint))), name="--lora")
    return loras


def _render(request: RenderRequest, checkpoint: str, **options: Any) -> Clip:
    from rich.console import Console

    from ltx_batch.renderer import load_renderer

    console = Console(stderr=True)
    with console.status("loading the model") as status:
        renderer = load_renderer(checkpoint, **options)
        try:
            status.update("rendering")
            return renderer.render([request])[0]
        finally:
            renderer.close()


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
