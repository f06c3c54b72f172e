"""From the start of a process to the end of its first denoise step, with a checkpoint folder on a local disk.

    python benchmarks/cold_start.py FOLDER --precision int8        # one start, told as JSON

`measure_starts` writes the folders of random weights and starts such processes. What the disk holds in the page cache and
which kernels are compiled already is told with each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ltx_batch.model.quantize.policy import Precision

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
SIZE = (512, 768, 49)
TINY = (64, 96, 9)
PRESET = "ltxv-13b-0.9.8-distilled"


# Names of figures, in order: the folder of that precision, what is asked for, and whether files come from the disk anew.
# The machine is bare, or was: the first start compiles the kernels and chooses their tiles.
STARTS = (
    ("cold_start_uncompiled_s", "int8", "int8", False),
    ("cold_start_s", "int8", "int8", True),
    ("cold_start_warm_s", "int8", "int8", False),
    ("cold_start_quantising_s", "bf16", "int8", True),
    ("cold_start_bf16_s", "bf16", "bf16", True),
)


def measure_starts(
    scratch: Path, policy: Precision, wanted: Callable[[str], bool], *, tiny: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of figures and what each start took, `seconds` and its parts. The disk holds one folder at a time."""
    bent = ["--hadamard-group", str(policy.hadamard_group)]
    bent += [] if policy.keep_blocks is None else ["--keep-blocks", str(policy.keep_blocks)]
    for kind, starts in groupby([one for one in STARTS if wanted(one[0])], key=lambda one: one[1]):
        folder = _write(scratch / kind, kind, bent if kind == "int8" else [], tiny=tiny)
        try:
            for name, _, precision, anew in starts:
                page_cache = drop_page_cache(folder) if anew else "warm"
                own = bent if kind != precision else []
                yield name, start(folder, precision, own, tiny=tiny, page_cache=page_cache)
        finally:
            shutil.rmtree(folder)


def start(folder: Path, precision: str, bent: list[str], *, tiny: bool, page_cache: str) -> dict[str, Any]:
    """A process of its own, from before it starts."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    command = [sys.executable, str(HERE / "cold_start.py"), str(folder), "--precision", precision, *bent]
    command += ["--tiny"] if tiny else []
    # What pip compiles when it installs, some images leave to every process: here the first start writes it.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    since = str(time.time())
    done = subprocess.run([*command, "--since", since], check=True, stdout=subprocess.PIPE, text=True, env=env)
    return {**json.loads(done.stdout.splitlines()[-1]), "page_cache": page_cache, "folder_gib": round(size / 2**30, 2)}


def drop_page_cache(folder: Path) -> str:
    """Have the folder's files come from the disk again; those of Python and its libraries stay, as on any host that has run
    a worker. Says what was done."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return "the folder's files dropped"


def _write(folder: Path, precision: str, bent: list[str], *, tiny: bool) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, str(HERE / "random_folder.py"), str(folder), "--precision", precision, *bent]
    subprocess.run([*command, "--model", "tiny" if tiny else "13b"], check=True)
    return folder


class _FirstStep(Exception):
    """The first step is done."""


def first_step(options: argparse.Namespace) -> dict[str, float]:
    """Seconds since the process was started: all of them, of the load with its imports, and of the step."""
    sys.path.insert(0, str(ROOT))
    from ltx_batch import RenderRequest, load_renderer

    renderer = load_renderer(
        str(options.folder),
        precision=options.precision,
        pipeline_config=PRESET,
        hadamard_group=options.hadamard_group,
        keep_blocks=options.keep_blocks,
        torch_threads=1 if options.tiny else None,
    )
    loaded_s = time.time()
    stepped_s = _step(renderer, TINY if options.tiny else SIZE, RenderRequest)
    return {
        "seconds": stepped_s - options.since,
        "load_s": round(loaded_s - options.since, 2),
        "first_step_s": round(stepped_s - loaded_s, 2),
    }


def _step(renderer: Any, size: tuple[int, int, int], request: Any) -> float:
    """When the first step of a render was done."""
    import torch

    def stop(*_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        raise _FirstStep

    height, width, frames = size
    handle = renderer._pipeline.transformer.register_forward_hook(stop)
    with suppress(_FirstStep):
        renderer.render([request(prompt="a red circle", height=height, width=width, num_frames=frames, seed=1)])
    done_s = time.time()
    handle.remove()
    return done_s


def main() -> None:
    since_s = time.time()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--hadamard-group", type=int, default=None)
    parser.add_argument("--keep-blocks", type=int, default=None)
    parser.add_argument(
        "--since", type=float, default=since_s, help="when the process was started, seconds of Unix time"
    )
    parser.add_argument("--tiny", action="store_true")
    print(json.dumps(first_step(parser.parse_args())))


if __name__ == "__main__":
    main()
