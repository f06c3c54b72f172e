"""Prompt enhancement as a step of its own: a manifest in, a manifest with longer prompts out, and nothing rendered.

What is done lies in parts beside the output, a few rows each, so that the same command goes on where it was cut short.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ltx_batch.errors import JobError, ManifestError, MediaError, RowIssue, StorageRefused
from ltx_batch.job import RowDefaults
from ltx_batch.manifest import Manifest, Row, Shard, resolve_rows
from ltx_batch.manifest.columns import UNREADABLE
from ltx_batch.manifest.rewrite import ORIGINAL, rewrite
from ltx_batch.manifest.rows import folder_of
from ltx_batch.media import load_frames
from ltx_batch.request import Condition
from ltx_batch.storage import Storage

if TYPE_CHECKING:
    from ltx_batch.model.enhance import Captioner, Enhancer

LLM = "unsloth/Llama-3.2-3B-Instruct"  # as the official configurations name it
_PART_ROWS = 64
_CHUNK_ROWS = 16_384
_PATH_COLUMNS = ("conditioning_media_paths", "input_media_path", "loras")

# What became of a row: its prompt was enhanced; it has words enough; it has media that nobody described; the model said
# nothing; it breaks a rule, or its picture cannot be read.
Fate = Literal["enhanced", "long", "media", "empty", "invalid"]


@dataclass(frozen=True, slots=True)
class EnhanceSpec:
    """How prompts are enhanced. The defaults are the official ones, but for a captioner: theirs brings code of its own."""

    llm: str = LLM
    captioner: str | None = None
    caption_task: str | None = None
    words_threshold: int = 120
    max_new_tokens: int = 256
    batch_size: int = 16
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Enhanced:
    """Rows by what became of them; `cut` are rows (file, row) whose answer was stopped before its end, `errors` what is
    wrong with the invalid ones."""

    rows: int
    fates: Mapping[str, int]
    cut: Sequence[tuple[str, int]] = ()
    errors: Sequence[RowIssue] = ()

    def as_dict(self) -> dict[str, Any]:
        fates = {name: self.fates.get(name, 0) for name in get_args(Fate)}
        cut = [{"file": file, "row": row} for file, row in self.cut]
        return {"rows": self.rows, **fates, "cut": cut, "errors": [issue.as_dict() for issue in self.errors]}


@dataclass(frozen=True, slots=True)
class _Task:
    """What the model is asked; rows that ask the same get the same answer."""

    prompt: str
    caption: str | None


@dataclass(frozen=True, slots=True)
class _Line:
    """One row of a part. `prompt` is the new one, or None."""

    fate: Fate
    prompt: str | None = None
    cut: bool = False
    errors: tuple[RowIssue, ...] = ()

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> _Line:
        return cls(**{**stored, "errors": tuple(RowIssue(**issue) for issue in stored.get("errors", ()))})


def enhance(
    manifest_uri: str,
    output: str,
    spec: EnhanceSpec,
    *,
    options: Mapping[str, Any] | None = None,
    listen: Callable[[int, int], None] = lambda done, rows: None,
) -> Enhanced:
    """Write the manifest at `output`, with prompts below `words_threshold` words enhanced; `listen` hears rows done, of all.

    Rows that break a rule stay as they are, and so do those whose picture cannot be read. Where there are such rows, parts
    without any are kept: when pictures are mended and the output is removed, the same call makes the other parts alone.
    `options` are fsspec options for all URIs. Raises JobError, ManifestError or CheckpointError; parts that are done stay.
    """
    manifest = Manifest.open(manifest_uri, options=options)
    _check(manifest, output)
    folder, _, name = output.rpartition("/")
    storage = Storage(folder or ".", options=options)
    if storage.exists(name):
        raise JobError(f"{output} is there already; remove it, or write to another name")
    work = _Work(manifest, spec, storage, f"{name}.parts/{_mark(manifest, spec)}")
    summary = _enhance_all(manifest, work, listen)
    with tempfile.TemporaryDirectory(prefix="ltx_batch-") as scratch:
        target = Path(scratch, name)
        rewrite(manifest, _PART_ROWS, lambda shard: [line.prompt for line in work.part(shard)], target)
        storage.upload(target, name)
    for part in set(storage.list(f"{name}.parts")) - (work.sound if summary.errors else set()):
        storage.delete(part)
    return summary


def _check(manifest: Manifest, output: str) -> None:
    """What would spoil the new manifest."""
    suffixes = {Path(ref.uri).suffix.lower() for ref in manifest.files}
    if {Path(output).suffix.lower()} != suffixes:
        raise JobError(f"{output}: give a file that ends in {' or '.join(suffixes)}, as the manifest's do")
    header = {name for file in range(len(manifest.files)) for name in manifest.header(file)}
    if ORIGINAL in header:
        raise JobError(f"{manifest.uri} has a column {ORIGINAL}: it was enhanced before")
    elsewhere = {folder_of(ref.uri) for ref in manifest.files} - {Storage(output.rpartition("/")[0] or ".").uri}
    if elsewhere and header & set(_PATH_COLUMNS):
        raise JobError(
            f"{output} must lie beside the manifest, in {elsewhere.pop()}: paths in it start from the manifest's folder"
        )
    _check_lines(manifest)


def _check_lines(manifest: Manifest) -> None:
    """A line that is no row cannot be written anew: all of them are told of before any work."""
    issues: list[RowIssue] = []
    for shard in manifest.shards(_CHUNK_ROWS):
        table = manifest.read(shard, columns=["prompt"])
        if UNREADABLE in table.column_names:
            rows = resolve_rows(table, manifest=manifest, shard=shard, defaults=RowDefaults())
            issues += [issue for row in rows for issue in row.issues if issue.column is None]
    if issues:
        raise ManifestError(issues)


def _mark(manifest: Manifest, spec: EnhanceSpec) -> str:
    """Parts of another manifest, or made in another way, are others."""
    files = [[part["sha256"], part["rows"]] for part in manifest.fingerprint()]
    return hashlib.sha256(json.dumps([files, asdict(spec)], sort_keys=True).encode()).hexdigest()[:16]


def _enhance_all(manifest: Manifest, work: _Work, listen: Callable[[int, int], None]) -> Enhanced:
    fates: Counter[str] = Counter()
    cut: list[tuple[str, int]] = []
    errors: list[RowIssue] = []
    for shard in manifest.shards(_PART_ROWS):
        lines = work.part(shard)
        fates.update(line.fate for line in lines)
        file = manifest.files[shard.file].uri
        cut += [(file, shard.offset + place) for place, line in enumerate(lines) if line.cut]
        errors += [issue for line in lines for issue in line.errors]
        listen(fates.total(), manifest.rows)
    return Enhanced(manifest.rows, fates, cut, errors)


class _Work:
    """Parts that are there are read, others made; the models are loaded for the first row that wants them. `sound` are the
    names of parts without a bad row."""

    def __init__(self, manifest: Manifest, spec: EnhanceSpec, storage: Storage, folder: str) -> None:
        self._manifest, self._spec, self._storage, self._folder = manifest, spec, storage, folder
        self._enhancer: Enhancer | None = None
        self._captioner: Captioner | None = None
        self.sound: set[str] = set()

    def part(self, shard: Shard) -> list[_Line]:
        name = f"{self._folder}/{shard.name}.json"
        try:
            lines = [_Line.of(line) for line in json.loads(self._storage.read(name))]
        except FileNotFoundError:
            lines = self._make(shard)
            self._storage.replace(name, json.dumps([asdict(line) for line in lines], default=str).encode())
        if not any(line.errors for line in lines):
            self.sound.add(name)
        return lines

    def _make(self, shard: Shard) -> list[_Line]:
        table = self._manifest.read(shard)
        rows = resolve_rows(table, manifest=self._manifest, shard=shard, defaults=RowDefaults())
        tasks = [self._task(row) for row in rows]
        answers = self._answers(list(dict.fromkeys(task for task in tasks if isinstance(task, _Task))))
        return [answers[task] if isinstance(task, _Task) else task for task in tasks]

    def _task(self, row: Row) -> _Task | _Line:
        """What to ask about a row; else its line, as nothing is asked."""
        request = row.request
        if request is None:
            return _Line("invalid", errors=row.issues)
        if len(request.prompt.split()) >= self._spec.words_threshold:
            return _Line("long")
        if not request.conditions and request.input_media is None:
            return _Task(request.prompt, None)
        first = request.conditions[0] if len(request.conditions) == 1 else None
        if first is None or first.start_frame or request.input_media is not None or self._spec.captioner is None:
            return _Line("media")
        try:
            return _Task(request.prompt, self._caption(first))
        except (MediaError, StorageRefused, PermissionError, IsADirectoryError) as error:
            return _Line("invalid", errors=(_bad_picture(row, first, str(error)),))

    def _caption(self, condition: Condition) -> str:
        """Raises what `load_frames` does, and MediaError for a picture that the captioner's processor cannot take."""
        from ltx_batch.model.enhance import Captioner

        if self._captioner is None:
            spec = self._spec
            self._captioner = Captioner(spec.captioner or "", spec.device, task=spec.caption_task)
        frames = np.asarray(load_frames(condition, 1, self._manifest.options).media)
        try:
            return self._captioner.caption(frames[0])
        except ValueError as error:
            raise MediaError(f"{condition.media}: {self._spec.captioner} cannot describe it: {error}") from error

    def _answers(self, tasks: Sequence[_Task]) -> dict[_Task, _Line]:
        from ltx_batch.model.enhance import Enhancer

        found: dict[_Task, _Line] = {}
        for start in range(0, len(tasks), self._spec.batch_size):
            batch = tasks[start : start + self._spec.batch_size]
            if self._enhancer is None:
                self._enhancer = Enhancer(self._spec.llm, self._spec.device, max_new_tokens=self._spec.max_new_tokens)
            answers = self._enhancer.answer([task.prompt for task in batch], [task.caption for task in batch])
            for task, answer in zip(batch, answers, strict=True):
                found[task] = _Line("enhanced", answer.text, answer.cut) if answer.text else _Line("empty")
        return found


def _bad_picture(row: Row, picture: Condition, rule: str) -> RowIssue:
    path = str(picture.media).removeprefix(f"{folder_of(row.file)}/")
    return RowIssue(row.file, row.row, row.row_id, _PATH_COLUMNS[0], [path], rule)
