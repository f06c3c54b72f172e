"""Plan: what a run would do and roughly cost, read from the manifest and the ledger. Starts nothing, loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from ltx_batch.admission import Admission
from ltx_batch.errors import CheckpointError, InvalidRow, PrecisionError, RowIssue, job_issue
from ltx_batch.foresight import foresee, model_sizes, text_sizes_of
from ltx_batch.job import JobSpec, ModelSpec
from ltx_batch.ledger import Ledger
from ltx_batch.manifest import COLUMNS, Manifest
from ltx_batch.manifest.cells import Cells
from ltx_batch.manifest.plans import PlanLookup
from ltx_batch.manifest.rules import check
from ltx_batch.model.forecast import Forecast, forecast, room_of
from ltx_batch.model.memory import ModelSizes, Work
from ltx_batch.model.plan import Doubt, Plan
from ltx_batch.model.room import TextSizes
from ltx_batch.recipe import job_precision, make_recipe, run_id, with_precision
from ltx_batch.request import RenderRequest
from ltx_batch.tally import Tally
from ltx_batch.worker import open_output

MAX_SHAPES = 2000  # that are told; rows of further ones are counted together
_MEASURED_SHARDS = 32  # of each earlier run: enough for an average, few enough to read
_CHUNK_ROWS = 16_384
_FILES = ("conditioning_media_paths", "input_media_path", "loras")
Size = tuple[int, int, int]  # height, width, num_frames
_OTHER: Size = (0, 0, 0)  # stands for all sizes that are not told


@dataclass(frozen=True, slots=True)
class Pass:
    """One run of the denoise loop: padded size in pixels, latent tokens, calls of the transformer, rows of all calls
    (guidance asks for two or three at once), and the timesteps, from 1 (noise) down, without the final 0."""

    height: int
    width: int
    tokens: int
    calls: int
    row_forwards: int
    timesteps: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """Rows of one size that take the same passes. `new` of them have no clip yet, `memory` is what the largest takes of a
    GPU; None where that is not known."""

    height: int
    width: int
    num_frames: int
    rows: int
    new: int | None
    passes: tuple[Pass, ...]
    memory: Forecast | None = None


Kind = tuple[Size, tuple[Pass, ...]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the new rows will take, going by rows of their sizes in this output; None and a reason where there are none.

    `worker_hours` are one worker's hours of rendering, `gpu_hours` those in which it holds a GPU.
    """

    worker_hours: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None
    storage_bytes: int | None = None
    measured_rows: int = 0
    note: str | None = None


@dataclass(frozen=True, slots=True)
class JobPlan:
    """`new` rows would be rendered, `done` have their clip, `failed` wait for `retry`, `invalid` break the contract.

    `done` and `failed` are None where keys cannot be made, which `note` explains. `other_rows` are of more sizes than
    `shapes` tells. `warnings` say what was assumed, what could not be told and why, and what is wrong with the model.
    """

    new: int
    done: int | None
    failed: int | None
    invalid: int
    shapes: tuple[Shape, ...]
    estimate: Estimate
    other_rows: int = 0
    note: str | None = None
    warnings: tuple[RowIssue, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        data = asdict(self)
        rows = {name: data.pop(name) for name in ("new", "done", "failed", "invalid")}
        return {"rows": rows, **data}


def make_plan(job: JobSpec) -> JobPlan:
    """Raises JobError or ManifestError where nothing could be planned."""
    manifest = Manifest.open(job.manifest, options=job.storage.options)
    ledger = Ledger(open_output(job))
    seen = foresee(job.model, job.storage.options)
    lookup = PlanLookup(partial(_planned, seen.planner), job.defaults)
    survey = _survey(job, manifest, lookup)
    found = _compare(job, manifest, ledger, survey, lookup)
    sizes, unsized = _sizes(job.model, job.storage.options)
    text, unread = _text_sizes(job, sizes)
    known, invalid = found.new is not None, survey.invalid + found.unusable
    new = found.new or Counter()
    return JobPlan(
        new=sum(new.values()) if known else manifest.rows - invalid,
        done=found.done if known else None,
        failed=found.failed if known else None,
        invalid=invalid,
        shapes=tuple(_with_memory(job, sizes, text, survey, _with_new(survey.rows, new if known else None))),
        estimate=_estimate(job, ledger, found.recipe, new) if known else Estimate(note=found.note),
        other_rows=survey.other_rows,
        note=found.note,
        warnings=(*seen.errors, *seen.unchecked, *seen.assumed, *unsized, *unread),
    )


# shapes


@dataclass(frozen=True, slots=True)
class _Planned:
    """A plan and what it is told as."""

    plan: Plan
    kind: Kind

    @property
    def doubts(self) -> tuple[Doubt, ...]:
        return self.plan.doubts


@dataclass(slots=True)
class _Survey:
    """Rows by size and passes, the most work of each kind, and how many rows break a rule."""

    rows: Counter[Kind] = field(default_factory=Counter)
    works: dict[Kind, Work] = field(default_factory=dict)
    other: Counter[Size] = field(default_factory=Counter)
    invalid: int = 0

    @property
    def other_rows(self) -> int:
        return self.other[_OTHER]

    @property
    def sizes(self) -> Counter[Size]:
        """Rows by size, and those of other sizes under `_OTHER`."""
        found = Counter(self.other)
        for (size, _), rows in self.rows.items():
            found[size] += rows
        return found

    def add(self, planned: _Planned, rows: int, work: Work) -> None:
        if planned.kind not in self.rows and len(self.rows) >= MAX_SHAPES:
            self.other[_OTHER] += rows
            return
        self.rows[planned.kind] += rows
        self.works[planned.kind] = _larger(self.works.get(planned.kind, work), work)


def _planned(planner: Callable[[RenderRequest], Plan], request: RenderRequest) -> _Planned:
    plan = planner(request)
    return _Planned(plan, (_size(request), _passes(plan)))


def _survey(job: JobSpec, manifest: Manifest, lookup: PlanLookup) -> _Survey:
    survey = _Survey()
    for shard in manifest.shards(_CHUNK_ROWS):
        cells, faults = check(manifest.read(shard, columns=tuple(COLUMNS)), job.defaults)
        sound = np.ones(cells.rows, bool)
        sound[[fault.row for fault in faults]] = False
        given, loras = _given(cells, "conditioning_media_paths"), _given(cells, "loras")
        for kind in lookup.kinds(cells):
            if isinstance(kind.plan, InvalidRow):
                sound[kind.rows] = False
            elif len(rows := kind.rows[sound[kind.rows]]):
                work = _work(
                    kind.plan.plan,
                    job.batch_size,
                    conditioned=bool(given[rows].any()),
                    has_input="input_media_path" in kind.own,
                    loras=bool(job.model.loras) or bool(loras[rows].any()),
                )
                survey.add(kind.plan, len(rows), work)
        survey.invalid += int(np.count_nonzero(~sound))
    return survey


def _given(cells: Cells, name: str) -> NDArray[np.bool_]:
    """Rows whose list is not empty."""
    lengths = pc.fill_null(pc.list_value_length(cells.array(name)), 0)
    return np.asarray(lengths.to_numpy(zero_copy_only=False)) > 0


def _work(plan: Plan, rows: int, *, conditioned: bool, has_input: bool, loras: bool) -> Work:
    """As far as it is known before media are looked at: a condition is taken to be a picture."""
    frames = plan.target.padded_frames if has_input else int(conditioned)
    return Work(plan, rows, frames, conditioned=conditioned, loras=loras)


def _passes(plan: Plan) -> tuple[Pass, ...]:
    return tuple(
        Pass(one.height, one.width, one.tokens, one.calls, one.row_forwards, tuple(round(s, 4) for s in one.sigmas))
        for one in plan.passes
    )


def _larger(one: Work, other: Work) -> Work:
    frames = max(one.encoded_frames, other.encoded_frames)
    conditioned, loras = one.conditioned or other.conditioned, one.loras or other.loras
    return replace(one, encoded_frames=frames, conditioned=conditioned, loras=loras)


def _sizes(model: ModelSpec, options: Mapping[str, Any]) -> tuple[ModelSizes | None, list[RowIssue]]:
    """How large the model is, where rows take a GPU's memory; or why that is not known."""
    if model.renderer == "fake" or model.device == "cpu":
        return None, []
    try:
        return model_sizes(model, options), []
    except PrecisionError:  # among foresight's errors
        return None, []
    except CheckpointError as error:
        return None, [job_issue("model.checkpoint", model.checkpoint, f"memory is not told: {error}")]


def _text_sizes(job: JobSpec, sizes: ModelSizes | None) -> tuple[TextSizes | None, list[RowIssue]]:
    """How large the text encoder is, where each worker has one; or why that is not known."""
    if sizes is None or job.text != "inline":
        return None, []
    try:
        return text_sizes_of(job.model, sizes.number_bytes, job.storage.options), []
    except PrecisionError:
        return None, []
    except CheckpointError as error:
        return None, [job_issue("model.text_encoder", job.model.text_encoder, f"its memory is not told: {error}")]


def _with_memory(
    job: JobSpec, sizes: ModelSizes | None, text: TextSizes | None, survey: _Survey, shapes: Iterator[Shape]
) -> Iterator[Shape]:
    """What each shape takes of a GPU, where one is asked for and the checkpoint is on this machine."""
    model = job.model
    if sizes is None:
        yield from shapes
        return
    room = room_of(model.device_memory_gib, max(1, int(job.worker.num_gpus or 1)))
    for shape in shapes:
        work = survey.works[(shape.height, shape.width, shape.num_frames), shape.passes]
        yield replace(shape, memory=forecast(sizes, work, room, model.placement, text))


def _size(request: RenderRequest) -> Size:
    return request.height, request.width, request.num_frames


def _with_new(shapes: Counter[Kind], new: Counter[Size] | None) -> Iterator[Shape]:
    """Largest sizes first. Rows of one size but other passes share its new rows in the order they are met."""
    left = Counter(new)
    for (size, passes), rows in sorted(shapes.items(), key=lambda item: item[0][0], reverse=True):
        share = min(rows, left[size])
        left[size] -= share
        yield Shape(*size, rows=rows, new=None if new is None else share, passes=passes)


# against the ledger


@dataclass(slots=True)
class _Comparison:
    """`new` counts rows by size; None where it cannot be told, for the reason in `note`. `unusable` rows name files that
    cannot be read."""

    new: Counter[Size] | None = None
    done: int = 0
    failed: int = 0
    unusable: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None


def _compare(job: JobSpec, manifest: Manifest, ledger: Ledger, survey: _Survey, lookup: PlanLookup) -> _Comparison:
    """Which rows the ledger knows: by this run's finished shards, then by key."""
    try:
        recipe = make_recipe(job)
        run = run_id(manifest.fingerprint(), recipe, job)
    except CheckpointError as error:
        return _Comparison(note=f"what is done shows only with the checkpoint at hand: {error}")
    precision = _precision(job, ledger, run, recipe)
    if precision is None:
        return _Comparison(note="what is done shows once a first run has resolved `precision: auto`")
    tally = Tally(run, manifest.rows)
    admission = Admission(job, ledger, manifest, run, check_media=False)
    admission.count_finished(list(manifest.shards(job.shard_rows)), tally, retry=False)
    if admission.fresh and not _names_files(manifest):
        return _Comparison(survey.sizes, recipe=recipe)
    found, sizes, new = _Comparison(done=tally.ok, failed=tally.failed, recipe=recipe), survey.sizes, Counter[Size]()
    for upcoming in admission.prepare(with_precision(recipe, precision), {}):
        prepared = upcoming.result()
        found.unusable += sum(record.error_class != "InvalidRow" for _, record in prepared.settled)
        for _, key, request, _ in prepared.wanted:
            if key in prepared.known:
                found.done += 1
            elif lookup.can_plan(request):
                new[size if (size := _size(request)) in sizes else _OTHER] += 1
    found.new = new
    return found


def _names_files(manifest: Manifest) -> bool:
    """Whether rows may name media or LoRA files, which may be missing."""
    return any(name in manifest.header(file) for file in range(len(manifest.files)) for name in _FILES)


def _precision(job: JobSpec, ledger: Ledger, run: str, recipe: Mapping[str, Any]) -> str | None:
    """The precision in this job's keys: for `auto` what this run resolved it to, else what another of the same recipe did."""
    asked, device = job.model.precision, job.model.device
    if asked != "auto":
        return job_precision(job).name
    runs = ledger.runs()
    for name in [run, *reversed(runs)]:
        described = ledger.read_run(name)
        if described is not None and described["recipe"] == recipe:
            return str(described["precision"])
    if device != "auto":
        return job_precision(job).name
    return None if runs else asked  # in an empty output no key is looked for


# what it will take


@dataclass(slots=True)
class _Measured:
    rows: int = 0
    render_s: float = 0.0
    gpu_s: float = 0.0
    bytes: int = 0


def _estimate(job: JobSpec, ledger: Ledger, recipe: Mapping[str, Any], new: Counter[Size]) -> Estimate:
    if not new.total():
        return Estimate(0.0, 0.0, None if job.gpu_hour_price is None else 0.0, 0)
    measured = _measure(ledger, recipe)
    unknown = [size for size in new if size not in measured]
    if unknown:
        height, width, num_frames = max(unknown)
        what = "the further sizes" if height == 0 else f"{width}x{height}, {num_frames} frames"
        return Estimate(note=f"no row of {what} was rendered in this output yet")
    known = [(count / measured[size].rows, measured[size]) for size, count in new.items()]
    gpu_hours = sum(share * one.gpu_s for share, one in known) / 3600
    return Estimate(
        worker_hours=round(sum(share * one.render_s for share, one in known) / 3600, 4),
        gpu_hours=round(gpu_hours, 4),
        cost=None if job.gpu_hour_price is None else round(gpu_hours * job.gpu_hour_price, 2),
        storage_bytes=round(sum(share * one.bytes for share, one in known)),
        measured_rows=sum(one.rows for _, one in known),
    )


def _measure(ledger: Ledger, recipe: Mapping[str, Any]) -> dict[Size, _Measured]:
    """Seconds and bytes by size, from finished shards of runs with this recipe."""
    measured: dict[Size, _Measured] = {}
    for run in ledger.runs():
        described = ledger.read_run(run)
        if described is None or described["recipe"] != recipe:
            continue
        for shard, epoch in list(ledger.finished_shards(run).items())[-_MEASURED_SHARDS:]:
            for line in ledger.read_shard(run, shard, epoch).to_pylist():
                _add(measured, line, described["job"]["defaults"])
    return measured


def _add(measured: dict[Size, _Measured], line: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    if line["ltx_status"] != "ok" or line["ltx_render_seconds"] is None:
        return
    height, width, num_frames = (int(line.get(name) or defaults[name]) for name in ("height", "width", "num_frames"))
    one = measured.setdefault((height, width, num_frames), _Measured())
    one.rows += 1
    one.render_s += line["ltx_render_seconds"]
    one.gpu_s += line["ltx_gpu_seconds"] or 0.0
    one.bytes += line["ltx_bytes"] or 0
