"""Validate: every broken rule of a whole manifest, in one pass and in bounded memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ltx_batch.errors import ManifestError, RowIssue, job_issue
from ltx_batch.job import JobSpec
from ltx_batch.lora import Shapes
from ltx_batch.manifest.cells import Cells
from ltx_batch.manifest.columns import COLUMNS, near_misses
from ltx_batch.manifest.loras import LoraLookup, check_files, job_loras
from ltx_batch.manifest.media import MediaLookup
from ltx_batch.manifest.media_fit import MAX_OPENED, MediaFit, MediaProbe
from ltx_batch.manifest.plans import PlanLookup, Planner, Told
from ltx_batch.manifest.read import Manifest, Shard
from ltx_batch.manifest.rows import folder_of, issues_of
from ltx_batch.manifest.rules import check, check_defaults, in_order
from ltx_batch.manifest.tokens import TokenCounter

MAX_ISSUES = 100_000  # kept in full; further ones are counted
MAX_REPEATS = 1_000_000
_CHUNK_ROWS = 16_384
_COLUMNS = tuple(COLUMNS)


@dataclass(slots=True)
class Validation:
    """What is wrong with a manifest. `errors` keep rows from being rendered, `warnings` do not.

    Each list keeps the first `MAX_ISSUES` (repeated row_ids all of them); the counts count all.
    """

    rows: int
    errors: list[RowIssue] = field(default_factory=list)
    warnings: list[RowIssue] = field(default_factory=list)
    error_count: int = 0
    warning_count: int = 0

    def add_errors(self, issues: Iterable[RowIssue], count: int) -> None:
        self.errors += islice(issues, max(0, MAX_ISSUES - len(self.errors)))
        self.error_count += count

    def add_warnings(self, issues: Iterable[RowIssue], count: int) -> None:
        self.warnings += islice(issues, max(0, MAX_ISSUES - len(self.warnings)))
        self.warning_count += count

    def as_dict(self) -> dict[str, Any]:
        return {
            "errors": [issue.as_dict() for issue in self.errors],
            "warnings": [issue.as_dict() for issue in self.warnings],
            "rows": self.rows,
            "error_count": self.error_count,
            "warning_count": self.warning_count,
        }


def validate(
    manifest: Manifest,
    job: JobSpec,
    *,
    tokenizer: Path | None,
    layers: Callable[[], Shapes | None] | None = None,
    planner: Planner | None = None,
    probe: MediaProbe | None = None,
    errors: Sequence[RowIssue] = (),
    warnings: Sequence[RowIssue] = (),
) -> Validation:
    """Check every row, and what only the whole manifest shows: repeated row_ids and missing media.

    `tokenizer` is a tokenizer.json or a spiece.model; None leaves unchecked whether prompts can be read whole. `layers`
    gives the transformer's linear layers, and is asked where there are LoRA files; None leaves unchecked whether they fit,
    which is a warning where it comes from `layers`. `errors` and `warnings` are those known before.
    `planner` answers a request with its plan, or raises InvalidRow; without it no row is held against the pipeline config.
    `probe` opens local media; without it they are only looked for.
    A value of the job that breaks a rule is told once, with JOB_FILE for a file. Raises CheckpointError for a tokenizer or
    a LoRA file of the job that cannot be used.
    """
    loras = LoraLookup(job.storage.options, layers or (lambda: None))
    check_files(job_loras(job), loras)
    found = Validation(manifest.rows)
    of_defaults = check_defaults(job.defaults)
    found.add_errors([*errors, *of_defaults], len(errors) + len(of_defaults))
    found.add_warnings(warnings, len(warnings))
    plans = PlanLookup(None if of_defaults else planner, job.defaults)
    of_job = JobTold(job)
    media, fit = MediaLookup(job.storage.options), MediaFit(probe)
    tokens, ids = TokenCounter(tokenizer), RowIds(manifest)
    unseeded = 0
    for shard, table in _chunks(manifest, _COLUMNS):
        file = manifest.files[shard.file].uri
        cells, broken = check(table, job.defaults)
        folder = folder_of(file)
        missing = media.missing(cells, folder) + loras.faults(cells, folder)
        unfit, doubtful = fit.told(cells, folder, job.defaults.num_frames)
        told = of_job.sift(plans.told(cells))
        planned = [fault for one in told if one.is_error for fault in one.faults()]
        faults = in_order(broken + missing + unfit + planned)
        found.add_errors(issues_of(table, cells, faults, file=file, offset=shard.offset), len(faults))
        doubts = in_order(
            tokens.doubts(cells) + doubtful + [fault for one in told if not one.is_error for fault in one.faults()]
        )
        found.add_warnings(issues_of(table, cells, doubts, file=file, offset=shard.offset), len(doubts))
        unseeded += int(np.count_nonzero(cells.present("prompt") & ~cells.present("seed") & ~cells.present("row_id")))
        ids.add(cells)
    of_job.add_to(found)
    repeated = ids.repeated()
    found.errors += repeated
    found.error_count += len(repeated)
    about_all = _look_alikes(manifest) + _unseeded(manifest, unseeded, job.defaults.seed)
    if fit.unopened:
        rule = f"files beyond {MAX_OPENED['pictures']} pictures and {MAX_OPENED['videos']} videos were not opened"
        about_all.append(RowIssue(manifest.uri, None, None, "conditioning_media_paths", None, rule))
    if layers is not None and loras.unfitted:
        about_all.append(job_issue("model.checkpoint", job.model.checkpoint, _UNFITTED))
    if tokens.note is not None:
        about_all.append(RowIssue(manifest.uri, None, None, "prompt", None, tokens.note))
    found.add_warnings(about_all, len(about_all))
    return found


class JobTold:
    """What many rows break by one value of the job: told once, with how many rows it is."""

    def __init__(self, job: JobSpec) -> None:
        self._job = job
        self._rows: Counter[tuple[str, str, bool]] = Counter()

    def sift(self, told: Iterable[Told]) -> list[Told]:
        """Those that are the rows' own; the others are counted."""
        own = []
        for one in told:
            if one.own:
                own.append(one)
            else:
                self._rows[one.column or "", one.rule, one.is_error] += len(one.rows)
        return own

    def add_to(self, found: Validation) -> None:
        for (column, rule, is_error), rows in self._rows.items():
            add = found.add_errors if is_error else found.add_warnings
            add([job_issue(*self._value(column), f"{rule} ({rows} rows)")], 1)

    def _value(self, column: str) -> tuple[str, Any]:
        """The key that holds for rows without a value in the column, and its value."""
        default = getattr(self._job.defaults, column, None)
        config = ("model.pipeline_config", self._job.model.pipeline_config)
        return config if default is None else (f"defaults.{column}", default)


class RowIds:
    """Finds repeated row_ids with 8 bytes a row: all hashes first, then the few candidates exactly."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._hashes = np.empty(manifest.rows, np.int64)
        self._count = 0

    def add(self, cells: Cells) -> None:
        hashes = _hashes(cells.array("row_id"))
        self._hashes[self._count : self._count + len(hashes)] = hashes
        self._count += len(hashes)

    def repeated(self) -> list[RowIssue]:
        """An error for every row but the first with the same row_id."""
        hashes = self._hashes[: self._count]
        hashes.sort()
        twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        if len(twice) == 0:
            return []
        first: dict[str, tuple[str, int]] = {}
        issues: list[RowIssue] = []
        for shard, table in _chunks(self._manifest, ("row_id",)):
            ids, file = Cells(table).array("row_id"), self._manifest.files[shard.file].uri
            for row in np.flatnonzero(np.isin(_all_hashes(ids), twice)):
                row_id, place = ids[int(row)].as_py(), shard.offset + int(row)
                if row_id is not None and first.setdefault(row_id, (file, place)) != (file, place):
                    issues.append(_repeated(file, place, row_id, first[row_id]))
                    if len(issues) > MAX_REPEATS:
                        raise ManifestError([RowIssue(self._manifest.uri, None, None, "row_id", None, _NO_NAMES)])
        return issues


_UNFITTED = "LoRA files are not held against the transformer: its files are not at hand"
_NO_NAMES = f"more than {MAX_REPEATS} rows repeat another row's: rename the column if it does not name rows"


def _repeated(file: str, row: int, row_id: str, first: tuple[str, int]) -> RowIssue:
    where = f"row {first[1]}" if first[0] == file else f"{first[0]} row {first[1]}"
    return RowIssue(file, row, row_id, "row_id", row_id, f"is the row_id of {where} already")


def _hashes(ids: pa.Array) -> np.ndarray:
    """Hashes of the ids that are not null. Python's own: seeded anew in each process, so nobody can prepare clashes."""
    return _all_hashes(ids.drop_null())


def _all_hashes(ids: pa.Array) -> np.ndarray:
    return np.fromiter((hash(row_id) for row_id in ids.to_pylist()), np.int64, len(ids))


def _chunks(manifest: Manifest, columns: tuple[str, ...]) -> Iterator[tuple[Shard, pa.Table]]:
    return ((shard, manifest.read(shard, columns=columns)) for shard in manifest.shards(_CHUNK_ROWS))


def _look_alikes(manifest: Manifest) -> list[RowIssue]:
    return [issue for file, ref in enumerate(manifest.files) for issue in near_misses(ref.uri, manifest.header(file))]


def _unseeded(manifest: Manifest, rows: int, seed: int) -> list[RowIssue]:
    rule = f"{rows} row(s) have neither seed nor row_id and take the job's seed {seed}: equal ones among them are one video"
    return [RowIssue(manifest.uri, None, None, "seed", None, rule)] if rows else []
