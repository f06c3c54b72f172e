"""The client's side of `submit.py --address`: hand a job to a Ray cluster, and stay until it is done."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from ltx_batch import __version__
from ltx_batch.errors import JobError
from ltx_batch.job import JobSpec
from ltx_batch.paths import refuse_relative
from ltx_batch.ray_jobs import RayJobs

_NAME_CHARS = 32
_TAIL_CHARS = 1_000_000  # of the log, kept to find the JSON line in


def submit(job: JobSpec, arguments: Sequence[str], job_file: str, address: str, as_json: bool) -> int:
    """Run `job_file` with `arguments` on the cluster at `address`, follow its log, return its driver's exit code.

    `job` is the same file as read here: what is wrong with it shows before anything is sent. With `as_json` the log goes
    to standard error, and standard output gets the driver's JSON line. Raises JobError before the job is started.
    """
    refuse_relative(job)
    project = project_folder()
    entrypoint = _entrypoint(job_file, arguments, project)
    cluster = RayJobs(address)
    metadata = {"job": job_file, "manifest": job.manifest, "output": job.output, "ltx_batch": __version__}
    key, fresh = cluster.submit(_name(job_file, job, entrypoint), entrypoint, project, metadata)
    said = f"submitted to {cluster.address} as" if fresh else "this job is on the cluster already; following"
    print(f"{said} {key}", file=sys.stderr, flush=True)
    log = _Log(sys.stderr if as_json else sys.stdout)
    try:
        code = cluster.follow(key, log.write)
    except KeyboardInterrupt:
        print(f"\n{cluster.how_to_go_on(key)}", file=sys.stderr)
        raise
    if as_json:
        print(
            log.json_line()
            or json.dumps({"error": f"the job {key} printed no result, its log says why; its exit code is {code}"})
        )
    return code


def project_folder() -> Path:
    """The folder that goes to the cluster. Raises JobError where this is an installed package without one."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / "submit.py").is_file():
        raise JobError(
            "--address sends the project's folder along, and this is an installed package: type it in a checkout, or, "
            "where the cluster's image has ltx-batch, `ray job submit --address ADDRESS -- ltx-batch run JOB.yaml`"
        )
    return folder


def _entrypoint(job_file: str, arguments: Sequence[str], project: Path) -> str:
    """The driver's command line. A job file outside the project does not travel, so its text is written into the command."""
    command = ["python", "submit.py"]
    path = Path(job_file).resolve()
    if path.is_relative_to(project):
        return shlex.join([*command, str(path.relative_to(project)), *arguments])
    text = path.read_text()
    mark = "END_OF_JOB"
    while mark in text:
        mark += "_"
    return f"{shlex.join([*command, '-', *arguments])} <<'{mark}'\n{text.rstrip()}\n{mark}"


def _name(job_file: str, job: JobSpec, entrypoint: str) -> str:
    """Equal for equal jobs, so that a scheduler that submits twice gets one job."""
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(job_file).stem).strip("-")[:_NAME_CHARS]
    digest = hashlib.sha256(f"{entrypoint}\n{job.model_dump_json()}".encode()).hexdigest()
    return f"ltx-{stem}-{digest[:12]}"


class _Log:
    """Passes a log on and remembers its end."""

    def __init__(self, to: TextIO) -> None:
        self._to = to
        self._tail = ""

    def write(self, text: str) -> None:
        print(text, end="", file=self._to, flush=True)
        self._tail = (self._tail + text)[-_TAIL_CHARS:]

    def json_line(self) -> str | None:
        """The last line that is a JSON object."""
        for line in reversed(self._tail.splitlines()):
            if line.startswith("{"):
                try:
                    json.loads(line)
                except ValueError:
                    continue
                return line
        return None
