"""The verbs that take a job file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from ltx_batch.cli.options import AsJson, Asked, JobFile, ManifestUri, OutputUri, Overrides, SkipInvalid, asked, program
from ltx_batch.cli.output import after_failures, counts, duration, print_errors, print_json, print_places, print_summary

if TYPE_CHECKING:
    from ltx_batch.driver import RunOptions
    from ltx_batch.manifest import Validation

_SHOWN_ERRORS = 50
_SHOWN_WARNINGS = 20

_AS_OF: dict[tuple[str, str | None], str] = {  # which counts a status shows where nobody writes heartbeats any more
    ("silent", "heartbeat"): ", as of that heartbeat",
    ("silent", "shards"): ", in finished shards: the heartbeat is older",
}

CheckMedia = Annotated[
    bool, typer.Option("--check-media", help="Look at finished shards again: their media may have changed.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="http://HEAD:8265",
        help="Hand the job to this Ray cluster, follow its log, return the driver's exit code.",
    ),
]


def run(
    job_file: JobFile,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    overrides: Overrides = None,
    skip_invalid: SkipInvalid = False,
    as_json: AsJson = False,
    check_media: CheckMedia = False,
    address: Address = None,
) -> int:
    """Render what is missing of a job, here or on a Ray cluster. The same command again goes on where it stopped."""
    from ltx_batch.driver import RunOptions

    wanted = asked(job_file, manifest, output, overrides, skip_invalid, as_json)
    if address is not None:
        from ltx_batch.submit import submit

        return submit(wanted.load(), wanted.arguments() + ["--check-media"] * check_media, job_file, address, as_json)
    return _drive(wanted, RunOptions(skip_invalid=skip_invalid, check_media=check_media))


def retry(
    job_file: JobFile,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    overrides: Overrides = None,
    skip_invalid: SkipInvalid = False,
    as_json: AsJson = False,
) -> int:
    """Try a job's failed rows again. Rows that are ok stay as they are."""
    from ltx_batch.driver import RunOptions

    wanted = asked(job_file, manifest, output, overrides, skip_invalid, as_json)
    return _drive(wanted, RunOptions(skip_invalid=skip_invalid, retry=True))


def _drive(wanted: Asked, options: RunOptions) -> int:
    from ltx_batch import driver
    from ltx_batch.cli.progress import progress

    job = wanted.load()
    with progress(f"{wanted.name} -> {job.output}") as listener:
        summary = driver.run(job, options, listen=listener)
    if summary.idle:
        what = "no row has failed: there is nothing to retry" if options.retry else "no row is left to render"
        print(what, file=sys.stderr if wanted.as_json else sys.stdout)
    print_summary(wanted, job.output, summary)
    code = 0 if summary.exit_code == 1 and job.on_failed_rows == "exit0" else summary.exit_code
    if wanted.as_json:
        print_json(summary.as_dict())
    return code


def validate(
    job_file: JobFile,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    overrides: Overrides = None,
    skip_invalid: SkipInvalid = False,
    as_json: AsJson = False,
) -> int:
    """Check a job file and every row of its manifest. Nothing is started; exit code 2 where rows are bad."""
    from ltx_batch.foresight import validate_job
    from ltx_batch.manifest import Manifest
    from ltx_batch.renderer import check_job

    job = asked(job_file, manifest, output, overrides, skip_invalid, as_json).load()
    check_job(job)
    found = validate_job(Manifest.open(job.manifest, options=job.storage.options), job)
    _print_validation(found, sys.stderr if as_json else sys.stdout)
    if as_json:
        print_json(found.as_dict())
    of_job = any(issue.row is None for issue in found.errors)  # which no run would skip
    return 2 if of_job or (found.error_count and not skip_invalid) else 0


def _print_validation(found: Validation, to: TextIO) -> None:
    for kind, issues, count, most in (
        ("warning", found.warnings, found.warning_count, _SHOWN_WARNINGS),
        ("error", found.errors, found.error_count, _SHOWN_ERRORS),
    ):
        for issue in issues[:most]:
            print(f"{kind}: {issue}", file=to)
        if count > most:
            print(f"... and {count - most} more {kind}s; --json lists them", file=to)
    print(f"{found.rows} rows, {found.error_count} errors, {found.warning_count} warnings", file=to)


def plan(
    job_file: JobFile,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    overrides: Overrides = None,
    skip_invalid: SkipInvalid = False,
    as_json: AsJson = False,
) -> int:
    """Show what a run would do. Rows by state and size, and an estimate from what this output has measured."""
    from ltx_batch.cli.tables import print_plan
    from ltx_batch.plan import make_plan

    found = make_plan(asked(job_file, manifest, output, overrides, skip_invalid, as_json).load())
    if as_json:
        print_json(found.as_dict())
    else:
        print_plan(found)
    return 0


def status(
    job_file: JobFile,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    overrides: Overrides = None,
    skip_invalid: SkipInvalid = False,
    as_json: AsJson = False,
) -> int:
    """Show how a job stands. From its output alone: nothing has to be running."""
    from ltx_batch.report.status import run_status

    wanted = asked(job_file, manifest, output, overrides, skip_invalid, as_json)
    job = wanted.load()
    found = run_status(job)
    if as_json:
        print_json(found.as_dict())
        return 0
    age = "" if found.heartbeat_age_s is None else f", last heartbeat {duration(found.heartbeat_age_s)} ago"
    dead = ": the driver seems dead" if found.state == "silent" else ""
    print(f"{found.state}{age}{dead}")
    print(counts(found.as_dict()) + _AS_OF.get((found.state, found.source), ""))
    if found.state == "running":
        left = "" if found.eta_s is None else f", {duration(found.eta_s)} left"
        print(f"{found.rows_per_s:.2f} rows/s, {found.workers} workers{left}")
    if found.stopped:
        print(f"stopped: {found.stopped}")
    print_errors(found.top_errors, sys.stdout)
    if found.run is not None and found.state != "not started":
        print_places(job.output, found.run, sys.stdout)
    if found.state in ("not started", "silent", "stopped"):
        print(f"next     {wanted.command('run')}")
    elif found.state == "finished" and found.failed:
        print(f"next     {after_failures(wanted, found.failed, found.top_errors)}")
    return 0


def report(
    job_file: JobFile,
    manifest: ManifestUri = None,
    output: OutputUri = None,
    overrides: Overrides = None,
    skip_invalid: SkipInvalid = False,
    as_json: AsJson = False,
) -> int:
    """Draw a contact sheet of a job's clips into its output."""
    from dataclasses import asdict

    from ltx_batch.report.contact_sheet import write_contact_sheet

    job = asked(job_file, manifest, output, overrides, skip_invalid, as_json).load()
    sheet = write_contact_sheet(job)
    if as_json:
        print_json(asdict(sheet))
        return 0
    more = "" if sheet.clips == sheet.ok else f"; the sheet shows {sheet.clips} different clips"
    print(f"{sheet.ok} of {sheet.rows} rows ok{more}")
    if sheet.unfinished:
        print(f"the run is not finished: {sheet.unfinished} more rows are in no finished shard yet, and not shown")
    print_places(job.output, sheet.run, sys.stdout)
    print(f"sheet    {sheet.path}")
    own = f'{program("ltx-batch")} render "a blue square moves up over a white background" -o clip.mp4'
    print(f"next     {own}   # a clip of your own")
    return 0
