"""`quantize`: a checkpoint to a folder whose transformer is quantised, once for all actors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ltx_batch.cli.options import AsJson
from ltx_batch.cli.output import print_json, unwritable
from ltx_batch.errors import JobError

_GIB = 2**30


def quantize(
    checkpoint: Annotated[str, typer.Argument(help="demo, an official name, a folder, a file, a URI or a hub id.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write, in diffusers' layout; it may not exist yet.")],
    precision: Annotated[str, typer.Option(help="int8, int8-weight, fp8, bnb-int8.")] = "int8",
    skip: Annotated[
        list[str] | None, typer.Option(help="A pattern of linear layers that stay as they are. Repeatable.")
    ] = None,
    hadamard_group: Annotated[int | None, typer.Option(help="int8 only: 0, 64 or 256; 64 by default.")] = None,
    keep_blocks: Annotated[
        int | None, typer.Option(help="Blocks at each end that stay; one in fourteen, at most two, by default.")
    ] = None,
    text_precision: Annotated[
        str | None, typer.Option(help="The same names: quantise the text encoder too, and put it beside it.")
    ] = None,
    text_encoder: Annotated[
        str | None,
        typer.Option(help="With --text-precision: where it is; the checkpoint's own, else the official one."),
    ] = None,
    upsampler: Annotated[str | None, typer.Option(help="A spatial upscaler to put beside it.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda: where weights are rounded.")] = "auto",
    as_json: AsJson = False,
) -> int:
    """Write a checkpoint with its transformer quantised. With the other parts, to a folder that loads as it is."""
    from ltx_batch.model.checkpoint import TextParts
    from ltx_batch.model.device import pick_device
    from ltx_batch.model.fetch import checkpoint_files, file_hash
    from ltx_batch.model.quantize.convert import convert_checkpoint
    from ltx_batch.model.quantize.policy import precision as make_policy
    from ltx_batch.model.sources import find_sources
    from ltx_batch.renderer import resolve_checkpoint

    if reason := unwritable(folder):
        raise JobError(f"{folder}: {reason}")
    if text_encoder is not None and text_precision is None:
        raise JobError("--text-encoder goes with --text-precision int8, or is left out")
    place = pick_device(device)
    # What stays unquantised keeps the checkpoint's own numbers, so the policy is that of a GPU everywhere.
    policy = make_policy(
        precision, "cuda", skip=tuple(skip or ()), hadamard_group=hadamard_group, keep_blocks=keep_blocks
    )
    named = None if text_encoder is None else resolve_checkpoint(text_encoder)
    sources, _ = find_sources(resolve_checkpoint(checkpoint), upsampler=upsampler, text_encoder=named)
    text, text_source = None, {}
    if text_precision is not None:
        text = TextParts.find(sources.local_text_encoder(), "bfloat16", precision=text_precision, device=place)
        text_source = {name: one for name, one in sources.text_hashes().items() if name.startswith("text_encoder/")}
    told = convert_checkpoint(
        sources.local_checkpoint(),
        folder,
        policy,
        {name: file_hash(ref) for name, ref in checkpoint_files(sources.checkpoint, folders=("transformer",)).items()},
        place,
        upsampler=None if upsampler is None else sources.local_upsampler(),
        text=text,
        text_source=text_source,
    )
    if as_json:
        print_json({"folder": str(folder), "precision": policy.name, **told})
        return 0
    print(
        f"{folder}: {told['quantized_layers']} linear layers as {policy.name}, {told['skipped_layers']} of the blocks' left "
        f"as they are; the transformer takes {told['transformer_bytes'] / _GIB:.2f} GiB, {told['share']:.2f} of bf16"
    )
    if text is not None:
        print(f"the text encoder as {text.precision} takes {told['text_bytes'] / _GIB:.2f} GiB")
    return 0
