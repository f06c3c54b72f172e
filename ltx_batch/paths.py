"""Which of a job's paths mean something where it runs."""

from __future__ import annotations

import os

from ltx_batch.errors import JobError
from ltx_batch.job import JobSpec
from ltx_batch.storage import is_local_uri, is_relative


def check_paths(job: JobSpec) -> None:
    """Raises JobError where a relative path would lie in the throw-away working directory of a Ray job."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # Ray's job supervisor gives it to every driver that it starts
        refuse_relative(job)


def refuse_relative(job: JobSpec) -> None:
    """Raises JobError where manifest or output mean something only in this working directory."""
    faults = [
        f"{name}: {uri} is relative, and the working directory of a Ray job is a copy that is thrown away; "
        f"give an absolute path or a URI with {option}"
        for name, option, uri in (
            ("manifest", "--manifest", job.manifest),
            ("output", "--output", job.output),
            ("text_cache", "--set text_cache=", job.text_cache),
        )
        if uri is not None and is_relative(uri)
    ] + [
        f"model.loras: {lora.path} is relative, and the working directory of a Ray job is a copy: give an absolute path "
        "or a URI"
        for lora in job.model.loras
        if is_relative(lora.path)
    ]
    if faults:
        raise JobError("\n".join(faults))


def refuse_local(job: JobSpec, nodes: int) -> None:
    """Raises JobError where workers on several nodes would write to a disk of their own each."""
    for name, uri in (("--output ", job.output), ("--set text_cache=", job.text_cache)):
        if uri is not None and is_local_uri(uri):
            raise JobError(
                f"{name}{uri} is a local path and the cluster has {nodes} nodes: each would write to its own disk; use "
                f"object storage, e.g. {name}s3://bucket/prefix"
            )
