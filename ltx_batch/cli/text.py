"""The verbs about prompts: `encode` and `enhance`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Protocol, TextIO

import typer

from ltx_batch.cli.options import AsJson, JobFile, ManifestUri, OutputUri, Overrides, SkipInvalid, asked
from ltx_batch.cli.output import duration, print_json

if TYPE_CHECKING:
    from ltx_batch.enhance import Enhanced

_SHOWN_CUTS = 20
_SHOWN_ERRORS = 50
_LINE_EVERY_S = 10.0


def encode(
    job_file: JobFile,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    overrides: Overrides = None,
    skip_invalid: SkipInvalid = False,
    as_json: AsJson = False,
) -> int:
    """Encode prompts of missing rows into a job's text cache. Nothing is rendered; failed rows count as missing."""
    from ltx_batch import driver
    from ltx_batch.cli.progress import progress
    from ltx_batch.driver import RunOptions

    wanted = asked(job_file, manifest, output, overrides, skip_invalid, as_json)
    job = wanted.load()
    with progress(f"{wanted.name}: text -> {job.text_cache_uri}") as listener:
        summary = driver.encode(job, RunOptions(skip_invalid=skip_invalid, retry=True), listen=listener)
    done = summary.text or {"encoded": 0, "cached": 0, "failed": 0, "seconds": 0.0}
    to = sys.stderr if as_json else sys.stdout
    failed = f", {done['failed']} failed" if done["failed"] else ""
    counted = f"{done['encoded']} texts encoded, {done['cached']} were in the cache{failed}"
    print(f"{counted}, in {duration(done['seconds'])}", file=to)
    print(f"cache    {job.text_cache_uri}", file=to)
    if summary.stopped:
        print(f"stopped: {summary.stopped}", file=to)
    if as_json:
        print_json({"run": summary.run, **done, "text_cache": job.text_cache_uri, "stopped": summary.stopped})
    return 3 if summary.stopped else 1 if done["failed"] else 0


def enhance(
    manifest: Annotated[str, typer.Argument(metavar="MANIFEST", help="File, folder or glob, at any URI.")],
    output: Annotated[str, typer.Option("-o", "--output", metavar="NEW_MANIFEST", help="A file of the same format.")],
    llm: Annotated[
        str | None, typer.Option(help="Instruct model: folder or hub id. Default: the official one.")
    ] = None,
    captioner: Annotated[
        str | None, typer.Option(help="Image-to-text model, for rows that begin with a picture: folder or hub id.")
    ] = None,
    caption_task: Annotated[str | None, typer.Option(help="Text that the captioner wants beside a picture.")] = None,
    words_threshold: Annotated[int, typer.Option(min=1, help="Prompts of so many words stay as they are.")] = 120,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longer answers are cut.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in one call of the model.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    as_json: AsJson = False,
) -> int:
    """Write a manifest with enhanced prompts. Nothing is rendered; the same command again goes on where it stopped.

    Exit code 1 where rows are bad: they are written as they are."""
    from ltx_batch.enhance import LLM, EnhanceSpec
    from ltx_batch.enhance import enhance as write

    spec = EnhanceSpec(llm or LLM, captioner, caption_task, words_threshold, max_new_tokens, batch_size, device)
    started_s = time.monotonic()
    with _rows(f"{manifest} -> {output}") as listen:
        done = write(manifest, output, spec, listen=listen)
    seconds = time.monotonic() - started_s
    _print_enhanced(done, output, seconds, sys.stderr if as_json else sys.stdout)
    if as_json:
        print_json({"output": output, **done.as_dict(), "seconds": round(seconds, 3)})
    return 1 if done.errors else 0


def _print_enhanced(done: Enhanced, output: str, seconds: float, to: TextIO) -> None:
    for file, row in done.cut[:_SHOWN_CUTS]:
        print(f"warning: {file} row {row}: the answer was cut; give it more --max-new-tokens", file=to)
    if len(done.cut) > _SHOWN_CUTS:
        print(f"... and {len(done.cut) - _SHOWN_CUTS} more; --json lists them", file=to)
    for issue in done.errors[:_SHOWN_ERRORS]:
        print(f"error: {issue}", file=to)
    if len(done.errors) > _SHOWN_ERRORS:
        print(f"... and {len(done.errors) - _SHOWN_ERRORS} more errors; --json lists them", file=to)
    told = done.as_dict()
    print(f"{done.rows} rows: {told['enhanced']} enhanced, in {duration(seconds)}", file=to)
    for fate, why in (
        ("long", "have words enough"),
        ("media", "have media that no captioner described"),
        ("empty", "got no answer"),
        ("invalid", "are bad, see the errors above"),
    ):
        if told[fate]:
            print(f"  {told[fate]} stay as they are: they {why}", file=to)
    print(f"manifest {output}", file=to)
    if done.errors:
        print(f"To have bad pictures done too: mend them, remove {output}, and give the same command", file=to)


class _Listen(Protocol):
    def __call__(self, done: int, rows: int) -> None: ...


@contextmanager
def _rows(title: str) -> Iterator[_Listen]:
    """A line that is drawn anew in a terminal, and now and then a line in a log."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(title) as status:
        told_s = [time.monotonic()]

        def listen(done: int, rows: int) -> None:
            status.update(f"{title}: {done}/{rows} rows")
            if not console.is_terminal and time.monotonic() - told_s[0] >= _LINE_EVERY_S:
                told_s[0] = time.monotonic()
                print(f"{done}/{rows} rows", file=sys.stderr, flush=True)

        yield listen
