"""Finding a job's run in its output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ltx_batch.errors import CheckpointError
from ltx_batch.job import JobSpec
from ltx_batch.ledger import Ledger
from ltx_batch.manifest import Manifest
from ltx_batch.recipe import make_recipe, run_id

if TYPE_CHECKING:
    import pyarrow as pa


def find_run(job: JobSpec, manifest: Manifest, ledger: Ledger) -> str | None:
    """The id of the job's run; where the checkpoint is not at hand, the latest run of the same manifest in the output."""
    try:
        return run_id(manifest.fingerprint(), make_recipe(job), job)
    except CheckpointError:
        return _latest(manifest.fingerprint(), ledger)


def read_lines(ledger: Ledger, run: str) -> Iterator[pa.Table]:
    """The tables of a run's finished shards, in the manifest's order."""
    for shard, epoch in sorted(ledger.finished_shards(run).items()):
        yield ledger.read_shard(run, shard, epoch)


def _latest(fingerprint: list[dict[str, Any]], ledger: Ledger) -> str | None:
    wanted = [part["sha256"] for part in fingerprint]
    found: list[tuple[float, str]] = []
    for run in ledger.runs():
        described, status = ledger.read_run(run), ledger.read_status(run)
        if described is not None and [part["sha256"] for part in described["manifest"]] == wanted:
            found.append((status["at_unix_s"] if status else 0.0, run))
    return max(found)[1] if found else None
