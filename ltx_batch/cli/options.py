"""The options that every job verb shares, and the job they make."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ltx_batch.job import JobSpec

JobFile = Annotated[str, typer.Argument(metavar="JOB.yaml", help="The job file; - reads it from standard input.")]
ManifestUri = Annotated[str | None, typer.Option("--manifest", metavar="URI", help="In place of the job's manifest.")]
OutputUri = Annotated[str | None, typer.Option("--output", metavar="URI", help="In place of the job's output.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. model.precision=bf16. Repeatable."),
]
SkipInvalid = Annotated[
    bool,
    typer.Option("--skip-invalid", help="Record bad rows as failed and take the others, in place of refusing all."),
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on the last line of standard output.")]


@dataclass(frozen=True, slots=True)
class Asked:
    """A job verb's shared options, as they were typed."""

    job_file: str
    manifest: str | None = None
    output: str | None = None
    overrides: tuple[str, ...] = ()
    skip_invalid: bool = False
    as_json: bool = False

    def load(self) -> JobSpec:
        """Raises JobError with every fault at once."""
        from ltx_batch.job import load_job

        text = sys.stdin.read() if self.job_file == "-" else None
        return load_job(self.job_file, overrides=[*self.overrides, *self._uris()], text=text)

    @property
    def name(self) -> str:
        """What the job is called in messages."""
        return "JOB.yaml" if self.job_file == "-" else self.job_file

    def arguments(self) -> list[str]:
        """The options without the job file, to type them again."""
        named = [
            ("--manifest", self.manifest),
            ("--output", self.output),
            *(("--set", each) for each in self.overrides),
        ]
        words = [word for name, value in named if value is not None for word in (name, value)]
        return words + ["--skip-invalid"] * self.skip_invalid + ["--json"] * self.as_json

    def command(self, verb: str) -> str:
        """A line that does `verb` to the same job, as this shell takes it."""
        words = [word for word in self.arguments() if word != "--json"]
        typed_submit = verb == "run" and Path(sys.argv[0]).name == "submit.py"
        start = [program("python"), sys.argv[0]] if typed_submit else [program("ltx-batch"), verb]
        return shlex.join([*start, self.name, *words])

    def _uris(self) -> list[str]:
        """JSON strings are YAML strings, whatever characters a path holds."""
        named = (("manifest", self.manifest), ("output", self.output))
        return [f"{name}={json.dumps(uri)}" for name, uri in named if uri is not None]


def program(name: str) -> str:
    """`name`, or its path beside this Python where the shell would find none or another: `make demo` leaves .venv inactive."""
    beside = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not beside.exists() or (found is not None and Path(found).parent == beside.parent):
        return name
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)


def asked(
    job_file: str,
    manifest: str | None,
    output: str | None,
    overrides: list[str] | None,
    skip_invalid: bool,
    as_json: bool,
) -> Asked:
    return Asked(job_file, manifest, output, tuple(overrides or ()), skip_invalid, as_json)
