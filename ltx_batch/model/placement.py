"""Where the parts of a model lie while a plan is rendered: a frozen decision and its reason, from sizes alone. No torch.

Parts leave the device for each other, and blocks of the transformer come from host memory one by one. What does not fit alone
is cut: the decode into slices, then a pass's tokens into chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, Literal, cast

from ltx_batch.errors import JobError
from ltx_batch.model import memory
from ltx_batch.model.memory import CHUNK_TOKENS, GIB, ModelSizes, Work
from ltx_batch.model.plan import PassPlan
from ltx_batch.model.slicing import Slices, are_thin, choose_slices, smaller_work_bytes
from ltx_batch.model.tiles import Tiles, choose_tiles

Mode = Literal["resident", "offload", "sharded"]
NAMES = ("auto", "resident", "offload", "sharded")
_SHARDED_TRIES = ((1.0, False), (0.25, False), (0.125, False), (0.125, True), (0.0, True))
_LEAST_WORK_BYTES = GIB  # what even a small clip wants beside the weights
_LARGE = 1.5  # times the smallest block: one that is not quantised among others that are
SLOTS = 2  # places on the device for the blocks that do not stay: one works, the next one comes


@dataclass(frozen=True, slots=True)
class PassPlacement:
    """How many of the transformer's blocks stay on the device during a pass, and whether its tokens go in chunks."""

    kept_blocks: int
    chunk_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Placement:
    """How a plan is rendered.

    `resident`: every part stays on the device. `offload`: each comes from host memory for its stage, and leaves after it;
    `beside` says how many of the transformer's blocks stay in other stages than its own, or that it leaves as a whole
    (None). `sharded`: VAE and upsampler come and leave, and the blocks lie on several GPUs, `shards` of them on each.
    `peak_bytes` is the predicted peak on the first GPU, without a text encoder; `fits` says whether that is there.
    """

    mode: Mode
    passes: tuple[PassPlacement, ...]
    reason: str
    peak_bytes: int
    fits: bool = True
    decode_slices: Slices | None = None
    encode_tiles: tuple[Tiles | None, ...] = ()
    beside: Mapping[str, int | None] = field(default_factory=dict)
    shards: tuple[int, ...] = ()

    @property
    def degraded(self) -> bool:
        """Whether pixels differ from an uncut render's by more than rounding."""
        return (self.decode_slices is not None and self.decode_slices.redraws) or any(self.encode_tiles)

    @property
    def ran(self) -> dict[str, Any]:
        """What a record says of it."""
        return {
            "mode": self.mode,
            "reason": self.reason,
            "kept_blocks": [one.kept_blocks for one in self.passes],
            "chunk_tokens": max((one.chunk_tokens or 0 for one in self.passes), default=0) or None,
            "predicted_peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True, slots=True)
class Strain:
    """What running out of memory has taught a process, for the rest of its life: `steps` down from what was predicted to
    fit (1: offload; 2: no block stays; 3: tokens in chunks), and the most bytes that a layer of the decoder works with."""

    steps: int = 0
    decode_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes that a render may use on its GPU, weights included, and on `others` of the same process. None: no limit is
    known."""

    bytes: int | None = None
    others: tuple[int, ...] = ()

    @property
    def usable(self) -> tuple[int, ...]:
        """Of each GPU: what is not left to the allocator's gaps and the prediction's error."""
        return tuple(int(memory.USABLE * count) for count in (self.bytes or 0, *self.others))

    def holds(self, wanted_bytes: int) -> bool:
        return self.bytes is None or wanted_bytes <= self.usable[0]

    def holds_easily(self, wanted_bytes: int, largest_bytes: int) -> bool:
        """Whether a gap is left for the largest tensor that comes and goes.

        torch's allocator, where no gap is large enough and it may not have more, gives all gaps back to the driver and
        takes memory anew: once a block.
        """
        if self.bytes is None:
            return True
        return self.holds(wanted_bytes) and wanted_bytes + largest_bytes <= memory.PREDICTED * self.bytes

    @property
    def told(self) -> str:
        return "unlimited memory" if self.bytes is None else gib(self.bytes)


def check_name(name: str) -> None:
    """Raises JobError for a placement that there is not."""
    if name not in NAMES:
        raise JobError(f"unknown placement {name!r}; what works: {', '.join(NAMES)}")


def decide(sizes: ModelSizes, work: Work, room: Room, asked: str = "auto", strain: Strain | None = None) -> Placement:
    """The placement of a plan. `auto`: the first that fits (resident: easily) of resident, sharded and offload, but one whose
    decode is cut into thin slices or that changes pixels only after the others; offload, with `fits` False, where none
    fits."""
    strain = strain or Strain()
    if asked == "offload" or strain.steps:
        return _offload(sizes, work, room, strain)
    if asked == "sharded":
        return _sharded(sizes, work, room, strain)
    resident = _resident(sizes, work, room, strain)
    if asked == "resident" or room.bytes is None:
        return resident
    choices = [resident] if _easily_resident(sizes, work, room) else []
    choices += [_sharded(sizes, work, room, strain)] if room.others else []
    choices.append(_offload(sizes, work, room, strain))
    last = work.plan.passes[-1]
    fitting = [choice for choice in choices if choice.fits]
    return min(
        fitting,
        key=lambda choice: (choice.degraded, are_thin(sizes, last, choice.decode_slices)),
        default=choices[-1],
    )


def first_mode(sizes: ModelSizes, room: Room, asked: str) -> Mode:
    """How parts are loaded, before any plan is known: onto the device where `resident`, else into host memory."""
    if asked != "auto":
        return cast(Mode, asked)
    if room.holds(sizes.weights_bytes + _LEAST_WORK_BYTES):
        return "resident"
    return "sharded" if room.others else "offload"


def step_down(sizes: ModelSizes, strain: Strain, stage: str, placement: Placement, work: Work) -> Strain | None:
    """What to go on with after `stage` ran out of memory under `placement`; None: there is nothing left to try."""
    if stage == "decode":
        smaller = smaller_work_bytes(sizes, work.plan.passes[-1], placement.decode_slices)
        return None if smaller is None else replace(strain, decode_bytes=smaller)
    reached = 0
    if placement.mode == "offload":
        chunked = all(one.chunk_tokens for one in placement.passes)
        reached = 3 if chunked else 2 if all(one.kept_blocks == 0 for one in placement.passes) else 1
    reached = max(strain.steps, reached)
    return None if reached == 3 else replace(strain, steps=reached + 1)


def needs(sizes: ModelSizes, work: Work) -> tuple[int, int]:
    """Bytes that a plan wants with every part resident, and about the least that it can do with."""
    resident = _resident(sizes, work, Room(), Strain())
    least = _offload(sizes, work, Room(0), Strain(steps=3)).peak_bytes  # slices of a tiny clip take more than the whole
    return resident.peak_bytes, min(least, resident.peak_bytes)


def gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


# everything on the device


def _resident(sizes: ModelSizes, work: Work, room: Room, strain: Strain) -> Placement:
    slices = _decode_slices(sizes, work, room, strain, beside_bytes=sizes.weights_bytes - sizes.decoder_bytes)
    stages = {**_beside(sizes, work, slices, ()), "denoise": _denoise_bytes(sizes, work)}
    stage = max(stages, key=lambda name: stages[name])
    peak = sizes.weights_bytes + stages[stage]
    return Placement(
        "resident",
        tuple(PassPlacement(len(sizes.blocks)) for _ in work.plan.passes),
        f"all parts and {stage} take {gib(peak)} of {room.told}{_cut(slices)}",
        peak,
        fits=room.holds(peak),
        decode_slices=slices,
    )


def _easily_resident(sizes: ModelSizes, work: Work, room: Room) -> bool:
    return all(
        room.holds_easily(
            sizes.weights_bytes + memory.denoise_bytes(sizes, one, work), memory.largest_bytes(sizes, one, work)
        )
        for one in work.plan.passes
    )


def _sharded(sizes: ModelSizes, work: Work, room: Room, strain: Strain) -> Placement:
    """Blocks go where most is left, so that what is left is alike; VAE and upsampler come to the first GPU for their
    stages, and the larger the share of the decode that is counted there, the fewer blocks it gets."""
    last = work.plan.passes[-1]
    whole = memory.decode_bytes(sizes, last.height * last.width * last.num_frames)
    for share, chunked in _SHARDED_TRIES:
        denoise = max(memory.denoise_bytes(sizes, one, work, chunked=chunked) for one in work.plan.passes)
        left = [usable - denoise for usable in room.usable]
        left[0] -= sizes.rest_bytes + max(0, sizes.decoder_bytes + int(share * whole) - denoise)
        shards = _deal(sizes, left)
        if min(left) >= 0:
            break
    held = sizes.rest_bytes + sum(sizes.blocks[: shards[0]])
    slices = _decode_slices(sizes, work, room, strain, beside_bytes=held)
    peak = held + max(denoise, *_guest_bytes(sizes, work, slices, ()).values())
    return Placement(
        "sharded",
        tuple(PassPlacement(len(sizes.blocks), CHUNK_TOKENS if chunked else None) for _ in work.plan.passes),
        f"{len(sizes.blocks)} blocks over {len(shards)} GPUs, {' and '.join(map(str, shards))}{_cut(slices)}",
        peak,
        fits=min(left) >= 0 and room.holds(peak),
        decode_slices=slices,
        shards=tuple(shards),
    )


def _deal(sizes: ModelSizes, left: list[int]) -> list[int]:
    """Blocks on each GPU, in order. `left`, the bytes there are on each, becomes what is left."""
    shards = [0] * len(left)
    average, had = sum(sizes.blocks) // len(sizes.blocks), list(left)
    for _ in sizes.blocks:
        most = max(range(len(left)), key=lambda index: left[index])
        left[most] -= average
        shards[most] += 1
    ends = list(accumulate(shards))
    left[:] = [room - sum(sizes.blocks[end - count : end]) for room, count, end in zip(had, shards, ends, strict=True)]
    return shards


# each part for its stage


def _offload(sizes: ModelSizes, work: Work, room: Room, strain: Strain) -> Placement:
    passes = tuple(_place_pass(sizes, work, one, room, strain) for one in work.plan.passes)
    slices = _decode_slices(sizes, work, room, strain, beside_bytes=0)
    encode = tuple(_encode_tiles(sizes, work, one, room) for one in work.plan.passes)
    stages = _guest_bytes(sizes, work, slices, encode)
    beside = {name: _stay_beside(sizes, room, strain, passes, taken) for name, taken in stages.items()}
    peak = max(
        *(_pass_bytes(sizes, work, one, how) for one, how in zip(work.plan.passes, passes, strict=True)),
        *(taken + _held_bytes(sizes, beside[name]) for name, taken in stages.items()),
    )
    return Placement(
        "offload",
        passes,
        _why_offload(sizes, work, room, strain, passes) + _cut(slices),
        peak,
        fits=room.holds(peak),
        decode_slices=slices,
        encode_tiles=encode if any(encode) else (),
        beside=beside,
    )


def _place_pass(sizes: ModelSizes, work: Work, one: PassPlan, room: Room, strain: Strain) -> PassPlacement:
    kept = None if strain.steps == 3 else _kept_blocks(sizes, work, one, room, chunked=False)
    if kept is not None:
        return PassPlacement(0 if strain.steps == 2 else kept)
    kept = _kept_blocks(sizes, work, one, room, chunked=True)
    return PassPlacement(0 if strain.steps else kept or 0, CHUNK_TOKENS)


def _kept_blocks(sizes: ModelSizes, work: Work, one: PassPlan, room: Room, *, chunked: bool) -> int | None:
    """Blocks that stay beside a pass's activations: as many as fit easily with the slots for the others. None: not even the
    slots fit."""
    if room.bytes is None:
        return 0
    beside = sizes.rest_bytes + memory.denoise_bytes(sizes, one, work, chunked=chunked)
    largest = memory.largest_bytes(sizes, one, work, chunked=chunked)
    counts = range(len(sizes.blocks), 0, -1)
    none = 0 if room.holds(beside + _blocks_bytes(sizes, 0)) else None
    return next((count for count in counts if room.holds_easily(beside + _blocks_bytes(sizes, count), largest)), none)


def staying(blocks: Sequence[int], count: int) -> set[int]:
    """Which `count` of blocks of these bytes stay on a device: large ones first, since the slots must hold the largest that
    come; evenly apart, so that copies have time."""
    large = [index for index, taken in enumerate(blocks) if taken > _LARGE * min(blocks)]
    small = [index for index in range(len(blocks)) if index not in large]
    of_large = min(count, len(large))
    return _spread(large, of_large) | _spread(small, count - of_large)


def _spread(indices: Sequence[int], count: int) -> set[int]:
    total = len(indices)
    return {index for place, index in enumerate(indices) if (place + 1) * count // total > place * count // total}


def _blocks_bytes(sizes: ModelSizes, count: int) -> int:
    """What `count` blocks that stay and the slots for the others take."""
    stays = staying(sizes.blocks, count)
    coming = [taken for index, taken in enumerate(sizes.blocks) if index not in stays]
    return sum(sizes.blocks) - sum(coming) + SLOTS * max(coming, default=0)


def _stay_beside(
    sizes: ModelSizes, room: Room, strain: Strain, passes: tuple[PassPlacement, ...], taken: int
) -> int | None:
    """Blocks that stay while another part takes so much: as many as fit, of those that some pass keeps."""
    if room.bytes is None or strain.steps >= 2:
        return None
    left = room.usable[0] - taken
    most = max(one.kept_blocks for one in passes)
    return next((count for count in range(most, -1, -1) if _held_bytes(sizes, count) <= left), None)


def _held_bytes(sizes: ModelSizes, count: int | None) -> int:
    """Of the transformer, beside another part: `count` blocks and no slots."""
    if count is None:
        return 0
    return sizes.rest_bytes + sum(sizes.blocks[index] for index in staying(sizes.blocks, count))


def _pass_bytes(sizes: ModelSizes, work: Work, one: PassPlan, how: PassPlacement) -> int:
    taken = memory.denoise_bytes(sizes, one, work, chunked=how.chunk_tokens is not None)
    return sizes.rest_bytes + _blocks_bytes(sizes, how.kept_blocks) + taken


def _why_offload(sizes: ModelSizes, work: Work, room: Room, strain: Strain, passes: tuple[PassPlacement, ...]) -> str:
    if strain.steps:
        begin = f"memory ran out, step {strain.steps}"
    else:
        begin = f"resident wants {gib(_resident(sizes, work, Room(), Strain()).peak_bytes)} of {room.told}"
    kept = ", ".join(
        f"{one.name} keeps {how.kept_blocks} of {len(sizes.blocks)} blocks{' and goes in chunks' if how.chunk_tokens else ''}"
        for one, how in zip(work.plan.passes, passes, strict=True)
    )
    return f"{begin}: {kept}"


# stages


def _beside(sizes: ModelSizes, work: Work, slices: Slices | None, encode: tuple[Tiles | None, ...]) -> dict[str, int]:
    """Activations of the stages in which the transformer does not work."""
    passes, last = work.plan.passes, work.plan.passes[-1]
    decode = memory.decode_bytes(sizes, last.height * last.width * last.num_frames)
    if slices:
        decode = memory.sliced_decode_bytes(sizes, last, slices.work_bytes)
        decode += 0 if slices.to_host else memory.video_bytes(sizes, last)
    cuts = encode or (None,) * len(passes)
    condition = max(
        memory.encode_bytes(sizes, cut.pixels if cut else one.height * one.width, work.encoded_frames)
        for one, cut in zip(passes, cuts, strict=True)
    )
    upsample = max((memory.upsample_bytes(sizes, one) for one in passes[1:]), default=0)
    return {"condition": condition, "upsample": upsample, "decode": decode}


def _guest_bytes(
    sizes: ModelSizes, work: Work, slices: Slices | None, encode: tuple[Tiles | None, ...]
) -> dict[str, int]:
    """The same with the weights that come for the stage."""
    beside = _beside(sizes, work, slices, encode)
    weights = {
        "condition": sizes.encoder_bytes if work.encoded_frames else 0,
        "upsample": sizes.upsampler_bytes if len(work.plan.passes) > 1 else 0,
        "decode": sizes.decoder_bytes,
    }
    return {name: weights[name] + taken for name, taken in beside.items()}


def _denoise_bytes(sizes: ModelSizes, work: Work) -> int:
    return max(memory.denoise_bytes(sizes, one, work) for one in work.plan.passes)


def _decode_slices(sizes: ModelSizes, work: Work, room: Room, strain: Strain, *, beside_bytes: int) -> Slices | None:
    """Slices that fit beside so many bytes of other parts; None: the decode need not be cut."""
    left = None if room.bytes is None else room.usable[0] - beside_bytes - sizes.decoder_bytes
    return choose_slices(sizes, work.plan.passes[-1], left, strain.decode_bytes)


def _encode_tiles(sizes: ModelSizes, work: Work, one: PassPlan, room: Room) -> Tiles | None:
    whole = one.height * one.width
    if room.bytes is None or not work.encoded_frames:
        return None
    left = room.usable[0] - sizes.encoder_bytes
    if memory.encode_bytes(sizes, whole, work.encoded_frames) <= left:
        return None
    return choose_tiles(one.height, one.width, left // memory.encode_bytes(sizes, 1, work.encoded_frames))


def _cut(slices: Slices | None) -> str:
    return f", decoded in {slices}" if slices else ""
