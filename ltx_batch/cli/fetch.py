"""`fetch`: bring official weights from the model hub to this machine."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ltx_batch.cli.options import AsJson
from ltx_batch.cli.output import print_json
from ltx_batch.errors import CheckpointError, JobError, RunStopped

if TYPE_CHECKING:
    from ltx_batch.model.catalog import Official
    from ltx_batch.model.hub import HubFile, HubRepo
    from ltx_batch.model.hub_download import Told


@dataclass(frozen=True, slots=True)
class Wanted:
    """One name: its repository as the hub shows it, which files of it, and how much of them is still missing."""

    name: str
    repo: HubRepo
    files: tuple[HubFile, ...]
    official: Official | None
    missing_bytes: int

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Official names (without any, they are listed), or hub ids."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> int:
    """Bring weights from the model hub, or list them. Says files, size, licence and free space, asks, and checks."""
    if not names:
        return _list_names(as_json)
    from ltx_batch.model.hub_download import cache_folder

    wanted = [_look_up(name) for name in names]
    folder = cache_folder()
    needed_bytes, free_bytes = sum(one.missing_bytes for one in wanted), _free_bytes(folder)
    for one in wanted:
        _describe(one)
    _say(f"{_gb(needed_bytes)} to download into {folder}, where {_gb(free_bytes)} are free")
    if needed_bytes > free_bytes:
        raise CheckpointError(
            f"{folder} has {_gb(free_bytes)} free and {_gb(needed_bytes)} are needed: make room, or set HF_HOME to another disk"
        )
    if needed_bytes and not yes:
        _ask()
    paths = _bring(wanted, needed_bytes)
    lines = _job_lines(wanted)
    if as_json:
        print_json({"fetched": [_facts(one, paths) for one in wanted], "free_bytes": free_bytes, "job": lines})
    else:
        print("\n".join(["every file is there and has the hub's sha256. In the job file:", *lines]))
    return 0


def _look_up(name: str) -> Wanted:
    """Raises CheckpointError where the name is not one, or the hub does not show it."""
    from ltx_batch.model.catalog import find_official
    from ltx_batch.model.fetch import COMPONENTS, HubPlace, hub_files, locate
    from ltx_batch.model.hub import HubRepo
    from ltx_batch.model.hub_download import missing_bytes

    official = find_official(name)
    place = HubPlace(official.repo, file=official.file) if official else locate(name)
    if not isinstance(place, HubPlace):
        raise CheckpointError(
            f"{name} is here already, or at a URI, and can be used as it is: fetch brings what the model hub has"
        )
    repo = HubRepo.look_up(place.repo, place.revision)
    files = hub_files(repo, place, official.folders if official and official.folders else COMPONENTS)
    return Wanted(name, repo, tuple(files), official, sum(missing_bytes(repo, file) for file in files))


def _list_names(as_json: bool) -> int:
    """From what is written down here: no network."""
    from ltx_batch.model.catalog import OFFICIAL

    told = {name: _listed(one) for name, one in OFFICIAL.items()}
    if as_json:
        print_json({"names": told})
        return 0
    wide = max(map(len, told))
    print(f"{'name':<{wide}}  {'about':>7}  {'licence':<26}  what")
    for name, one in told.items():
        print(f"{name:<{wide}}  {one['size_gb']:>4.1f} GB  {one['licence']:<26}  {one['what']}")
    print("The licences restrict what may be done, some by revenue too: read them. `fetch NAME` names their texts.")
    return 0


def _listed(one: Official) -> dict[str, Any]:
    names = ("what", "size_gb", "licence", "licence_file", "repo", "file", "folders")
    return {name: getattr(one, name) for name in names}


def _describe(one: Wanted) -> None:
    _say(f"{one.name}: {one.repo.name} at {one.repo.commit}")
    for file in one.files:
        _say(f"  {_gb(file.size):>9}  {file.name}")
    _say(f"  licence: {one.repo.licence or 'the model card names none'}")
    for text in one.repo.licences():
        holds = one.official is not None and text == one.official.licence_file
        _say(f"           {text}{'   <- this one holds' if holds else ''}")


def _ask() -> None:
    """Raises JobError unless somebody agrees."""
    if not sys.stdin.isatty():
        raise JobError("nobody is there to ask: add --yes to download")
    if not typer.confirm("Download?", default=True, err=True):
        raise JobError("nothing was downloaded")


def _bring(wanted: Sequence[Wanted], needed_bytes: int) -> dict[str, Path]:
    """Paths of all files by repository and name. Raises RunStopped for what goes wrong once a download has begun."""
    from huggingface_hub.utils import disable_progress_bars

    from ltx_batch.model.hub_download import fetch_file

    disable_progress_bars()  # ours counts all files
    paths = {}
    with _progress(needed_bytes) as told:
        for one in wanted:
            for file in one.files:
                _say(f"{file.name}: {'in the cache, checking' if one.repo.cached(file.name) else 'downloading'}")
                try:
                    paths[f"{one.repo.name}/{file.name}"] = fetch_file(one.repo, file, told)
                except CheckpointError as error:
                    raise RunStopped(str(error)) from error
    return paths


@contextmanager
def _progress(needed_bytes: int) -> Iterator[Told]:
    """A bar in a terminal; in a log the lines of `_bring` are enough."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("download", total=needed_bytes)
        yield lambda count: bar.advance(task, count)


def _job_lines(wanted: Sequence[Wanted]) -> list[str]:
    """What to put into a job file, and what else such a job takes."""
    from ltx_batch.model.catalog import OFFICIAL, TEXT_ENCODER

    lines: list[str] = ["model:"]
    needs: set[str] = set()
    for one in wanted:
        official = one.official
        if official is None:
            lines.append(f"  checkpoint: {one.name}")
        elif official.name == TEXT_ENCODER:
            lines.append(f"  text_encoder: {official.name}    # the default of single files")
        elif official.is_checkpoint:
            lines += [f"  checkpoint: {official.name}", f"  pipeline_config: {official.name}"]
            needs |= {TEXT_ENCODER} | ({official.upscaler} if official.upscaler else set())
        else:
            lines.append(f"  upsampler: {official.name}    # the pipeline config of a 13B or 0.9.8 model names it too")
    missing = sorted(
        name for name in needs if name not in {one.name for one in wanted} and not _is_cached(OFFICIAL[name])
    )
    return lines + [f"# it also takes: ltx-batch fetch {' '.join(missing)}"] * bool(missing)


def _is_cached(official: Official) -> bool:
    from huggingface_hub import try_to_load_from_cache

    name = official.file or f"{official.folders[0]}/config.json"
    return isinstance(try_to_load_from_cache(official.repo, name), str)


def _facts(one: Wanted, paths: dict[str, Path]) -> dict[str, Any]:
    files = [
        {"name": f.name, "size_bytes": f.size, "sha256": f.sha256, "path": str(paths[f"{one.repo.name}/{f.name}"])}
        for f in one.files
    ]
    place = {"name": one.name, "repo": one.repo.name, "commit": one.repo.commit, "licence": one.repo.licence}
    return {**place, "size_bytes": one.size, "downloaded_bytes": one.missing_bytes, "files": files}


def _free_bytes(folder: Path) -> int:
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    return shutil.disk_usage(there).free


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
