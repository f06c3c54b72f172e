"""Everything that can go wrong, as one tree.

    LtxBatchError
    ├── UsageError            the user can mend it, and nothing was started (exit code 2)
    │   ├── JobError          the job file, an option, a path or an address
    │   ├── ManifestError     bad rows, all of them in `issues`
    │   ├── CheckpointError   weights that are missing, wrong or mixed
    │   ├── PrecisionError    a precision that is unknown, not built yet, or cannot run on this device
    │   └── StorageRefused    an output that cannot keep the ledger's promises
    ├── RowError              one row; the others go on (exit code 1 at the end)
    │   ├── MediaError        conditioning or input media that is missing, unreadable, too short or not what was hashed
    │   ├── EmbeddingMissing  a text that is not in the cache, where no text encoder is loaded
    │   ├── LoraError         a LoRA file that is missing, unreadable, not what was hashed, or not of this model
    │   ├── InvalidRow        a manifest row that breaks a rule (only with --skip-invalid)
    │   ├── EncodeError       the video could not be written
    │   ├── NotFinite         the model's numbers overflowed: another attempt renders without quantisation
    │   ├── RowTimeout        the row made no progress for too long
    │   └── WorkerDied        the row's process ended under it
    └── RunStopped            the run ended before its last row (exit code 3)

Any other exception that a row raises fails that row under its own class name. `retryable` says whether the
same row, unchanged, may succeed on another attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


class LtxBatchError(Exception):
    """Base of every error raised on purpose. The message says what happened and what to do."""

    exit_code = 3
    retryable = True


class UsageError(LtxBatchError):
    exit_code = 2
    retryable = False


class JobError(UsageError):
    pass


JOB_FILE = "the job file"


@dataclass(frozen=True, slots=True)
class RowIssue:
    """One broken rule in a manifest. `row` counts from 0 within `file`; `column` None means the row or the file. With
    JOB_FILE as `file` it is one of the job's own values, and `column` its key."""

    file: str
    row: int | None
    row_id: str | None
    column: str | None
    value: Any
    rule: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        place = self.file if self.row is None else f"{self.file} row {self.row}"
        named = f" ({self.row_id})" if self.row_id is not None else ""
        column = f", {self.column}" if self.column else ""
        shown = self.row is not None or self.value is not None
        value = f" = {self.value!r}" if self.column and shown else ""
        return f"{place}{named}{column}{value}: {self.rule}"


def job_issue(key: str, value: Any, rule: str) -> RowIssue:
    """A value of the job's own that breaks a rule."""
    return RowIssue(JOB_FILE, None, None, key, value, rule)


class ManifestError(UsageError):
    """`issues` holds every bad row; the message shows the first `shown`."""

    def __init__(self, issues: Sequence[RowIssue], *, shown: int = 50) -> None:
        self.issues = list(issues)
        what = "the job file" if all(issue.file == JOB_FILE for issue in self.issues) else "the manifest"
        lines = [f"{what} breaks {len(self.issues)} rule(s):", *(f"  {issue}" for issue in self.issues[:shown])]
        if len(self.issues) > shown:
            lines.append(f"  ... and {len(self.issues) - shown} more; `ltx-batch validate JOB --json` lists them all")
        if all(issue.row is not None for issue in self.issues):
            lines.append("Mend them, or render the other rows with --skip-invalid.")
        super().__init__("\n".join(lines))


class CheckpointError(UsageError):
    pass


class PrecisionError(UsageError):
    pass


class StorageRefused(UsageError):
    pass


class RowError(LtxBatchError):
    exit_code = 1


class MediaError(RowError):
    retryable = False


class LoraError(RowError):
    retryable = False


class EmbeddingMissing(RowError):
    retryable = False


class InvalidRow(RowError):
    """`columns` are those of the manifest that the rule is about, the one to change first."""

    retryable = False

    def __init__(self, message: str = "", *, columns: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.columns = tuple(columns)


class EncodeError(RowError):
    pass


class NotFinite(RowError):
    pass


class RowTimeout(RowError):
    pass


class WorkerDied(RowError):
    pass


class RunStopped(LtxBatchError):
    exit_code = 3
