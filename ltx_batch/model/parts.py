"""Opening a checkpoint, in diffusers' folder layout or an official single file: configs and headers only. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ltx_batch.errors import CheckpointError
from ltx_batch.model.fetch import SCHEDULER_FILE
from ltx_batch.model.part import KINDS, OWN_KEY, Part, Parts, held, read_component, read_file, read_json
from ltx_batch.model.sigmas import SchedulerConfig
from ltx_batch.model.single_file import read_checkpoint_file, read_upsampler_file
from ltx_batch.tensor_file import read_tensor_file

_EXPECTED = {
    **KINDS,
    "tokenizer": "a T5 tokenizer",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}


def open_checkpoint(place: Path, *, upsampler: Path | None = None) -> Parts:
    """`place` is a folder or a file; `upsampler` another folder or file for the spatial upscaler.

    Raises CheckpointError with what was found and what was expected.
    """
    parts = _open_folder(place) if place.is_dir() else read_checkpoint_file(read_tensor_file(place))
    return parts if upsampler is None else replace(parts, latent_upsampler=open_upsampler(upsampler))


def open_upsampler(place: Path) -> Part:
    """The spatial upscaler: the official file, a folder with latent_upsampler/, or that folder. Raises CheckpointError."""
    if not place.is_dir():
        return read_upsampler_file(read_tensor_file(place))
    inner = place / "latent_upsampler"
    return read_component(inner if inner.is_dir() else place, "latent_upsampler")


def check_layout(folder: Path, names: tuple[str, ...]) -> None:
    """Raises CheckpointError where `folder` lacks one of these folders."""
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(f'{name}/ ({_EXPECTED[name]})' for name in missing)}; it holds {held(folder)}. "
            "A checkpoint is an official .safetensors file, or a folder in diffusers' layout: transformer/ vae/ "
            "text_encoder/ tokenizer/ scheduler/"
        )


def _open_folder(folder: Path) -> Parts:
    check_layout(folder, ("transformer", "vae", "scheduler"))
    upsampler = folder / "latent_upsampler"
    vae = read_component(folder / "vae", "vae")
    own = read_json(folder / "transformer" / "config.json").get(OWN_KEY, {})
    # diffusers says nothing of it: its pipeline for 0.9.5 and later counts so, that for 0.9.0 and 0.9.1 does not.
    modern = "LTXVideo095DownBlock3D" in vae.config.get("down_block_types", ())
    return Parts(
        transformer=read_component(folder / "transformer", "transformer"),
        vae=vae,
        scheduler=SchedulerConfig.parse(read_file(folder / SCHEDULER_FILE), source=str(folder / SCHEDULER_FILE)),
        causal_positions=own.get("causal_positions", modern),
        timestep_scale=own.get("timestep_scale", 1000.0),
        latent_upsampler=read_component(upsampler, "latent_upsampler") if upsampler.is_dir() else None,
    )
