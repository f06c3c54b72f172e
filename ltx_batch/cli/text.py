"""The verbs about prompts: `encode` and `enhance`."""

from __future__ import annotations

import sys

from ltx_batch.cli.options import AsJson, JobFile, ManifestUri, OutputUri, Overrides, SkipInvalid, asked
from ltx_batch.cli.output import duration, print_json


def encode(
    job_file: JobFile,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    overrides: Overrides = None,
    skip_invalid: SkipInvalid = False,
    as_json: AsJson = False,
) -> int:
    """Encode the prompts of a job's missing rows into its text cache, and render nothing. Failed rows count as missing."""
    from ltx_batch import driver
    from ltx_batch.cli.progress import progress
    from ltx_batch.driver import RunOptions

    wanted = asked(job_file, manifest, output, overrides, skip_invalid, as_json)
    job = wanted.load()
    with progress(f"{wanted.name}: text -> {job.text_cache_uri}") as listener:
        summary = driver.encode(job, RunOptions(skip_invalid=skip_invalid, retry=True), listen=listener)
    done = summary.text or {"encoded": 0, "cached": 0, "seconds": 0.0}
    to = sys.stderr if as_json else sys.stdout
    print(f"{done['encoded']} texts encoded, {done['cached']} from before, in {duration(done['seconds'])}", file=to)
    print(f"cache    {job.text_cache_uri}", file=to)
    if summary.stopped:
        print(f"stopped: {summary.stopped}", file=to)
    if as_json:
        print_json({"run": summary.run, **done, "text_cache": job.text_cache_uri, "stopped": summary.stopped})
    return 3 if summary.stopped else 0
