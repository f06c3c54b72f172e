"""Plan: what a run would do and roughly cost, read from the manifest and the ledger. Starts nothing, loads no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ltx_batch.admission import Admission
from ltx_batch.errors import CheckpointError, InvalidRow
from ltx_batch.job import JobSpec
from ltx_batch.ledger import Ledger
from ltx_batch.manifest import Manifest, resolve_rows
from ltx_batch.model.forecast import Forecast, forecast, room_of, work_of_request
from ltx_batch.model.memory import Work
from ltx_batch.model.plan import Plan
from ltx_batch.recipe import job_precision, make_recipe, run_id, with_precision
from ltx_batch.renderer import job_planner, job_sizes
from ltx_batch.request import RenderRequest
from ltx_batch.tally import Tally
from ltx_batch.worker import open_output

_MEASURED_SHARDS = 32  # of each earlier run: enough for an average, few enough to read
Size = tuple[int, int, int]  # height, width, num_frames


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

    `done` and `failed` are None where keys cannot be made, which `note` explains.
    """

    new: int
    done: int | None
    failed: int | None
    invalid: int
    shapes: tuple[Shape, ...]
    estimate: Estimate
    note: str | None = None

    def as_dict(self) -> dict[str, Any]:
        data = asdict(self)
        rows = {name: data.pop(name) for name in ("new", "done", "failed", "invalid")}
        return {"rows": rows, **data}


def make_plan(job: JobSpec) -> JobPlan:
    """Raises JobError or ManifestError where nothing could be planned."""
    manifest = Manifest.open(job.manifest, options=job.storage.options)
    ledger = Ledger(open_output(job))
    shapes, works, invalid = _shapes(job, manifest)
    found = _compare(job, manifest, ledger)
    known = found.new is not None
    new = found.new or Counter()
    return JobPlan(
        new=sum(new.values()) if known else manifest.rows - invalid,
        done=found.done if known else None,
        failed=found.failed if known else None,
        invalid=invalid,
        shapes=tuple(_with_memory(job, works, _with_new(shapes, new if known else None))),
        estimate=_estimate(job, ledger, found.recipe, new) if known else Estimate(note=found.note),
        note=found.note,
    )


# shapes


def _shapes(job: JobSpec, manifest: Manifest) -> tuple[Counter[Kind], dict[Kind, Work], int]:
    """Rows by size and passes, the most work of each kind, and how many rows break a rule."""
    planner = job_planner(job.model, job.storage.options)
    counts: Counter[Kind] = Counter()
    works: dict[Kind, Work] = {}
    invalid = 0
    for shard in manifest.shards(job.shard_rows):
        for row in resolve_rows(manifest.read(shard), manifest=manifest, shard=shard, defaults=job.defaults):
            try:
                plan = _plan(row.request, planner)
            except InvalidRow:
                invalid += 1
                continue
            assert row.request is not None
            kind = _size(row.request), _passes(plan)
            counts[kind] += 1
            work = work_of_request(row.request, plan, job.batch_size)
            works[kind] = _larger(works.get(kind, work), work)
    return counts, works, invalid


def _plan(request: RenderRequest | None, planner: Callable[[RenderRequest], Plan]) -> Plan:
    if request is None:
        raise InvalidRow("the row breaks a rule of the manifest")
    return planner(request)


def _passes(plan: Plan) -> tuple[Pass, ...]:
    return tuple(
        Pass(one.height, one.width, one.tokens, one.calls, one.row_forwards, tuple(round(s, 4) for s in one.sigmas))
        for one in plan.passes
    )


def _larger(one: Work, other: Work) -> Work:
    frames = max(one.encoded_frames, other.encoded_frames)
    return replace(one, encoded_frames=frames, conditioned=one.conditioned or other.conditioned)


def _with_memory(job: JobSpec, works: Mapping[Kind, Work], shapes: Iterator[Shape]) -> Iterator[Shape]:
    """What each shape takes of a GPU, where one is asked for and the checkpoint is on this machine."""
    model = job.model
    sizes = job_sizes(model, job.storage.options)
    if sizes is None or model.device == "cpu":
        yield from shapes
        return
    room = room_of(model.device_memory_gib, max(1, int(job.worker.num_gpus or 1)))
    for shape in shapes:
        work = works[(shape.height, shape.width, shape.num_frames), shape.passes]
        yield replace(shape, memory=forecast(sizes, work, room, model.placement))


def _size(request: RenderRequest | None) -> Size:
    assert request is not None
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
    """`new` counts rows by size; None where it cannot be told, for the reason in `note`."""

    new: Counter[Size] | None = None
    done: int = 0
    failed: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None


def _compare(job: JobSpec, manifest: Manifest, ledger: Ledger) -> _Comparison:
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
    found = _Comparison(Counter(), tally.ok, tally.failed, recipe)
    assert found.new is not None
    for upcoming in admission.prepare(with_precision(recipe, precision), {}):
        prepared = upcoming.result()
        for _, key, request, _ in prepared.wanted:
            if key in prepared.known:
                found.done += 1
            else:
                found.new[_size(request)] += 1
    return found


def _precision(job: JobSpec, ledger: Ledger, run: str, recipe: Mapping[str, Any]) -> str | None:
    """The precision in this job's keys: for `auto` what this run resolved it to, else what another of the same recipe did."""
    asked, device = job.model.precision, job.model.device
    if asked != "auto":
        return job_precision(job)
    runs = ledger.runs()
    for name in [run, *reversed(runs)]:
        described = ledger.read_run(name)
        if described is not None and described["recipe"] == recipe:
            return str(described["precision"])
    if device != "auto":
        return job_precision(job)
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
        return Estimate(note=f"no row of {height}x{width}, {num_frames} frames was rendered in this output yet")
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
