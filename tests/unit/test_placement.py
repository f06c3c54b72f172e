"""Where parts lie and what that takes, as tables: no torch and no device."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from ltx_batch.errors import JobError
from ltx_batch.model import memory
from ltx_batch.model.memory import GIB, ModelSizes, Work
from ltx_batch.model.pipeline_config import load_pipeline_config
from ltx_batch.model.placement import Placement, Room, Strain, check_name, decide, needs, staying, step_down
from ltx_batch.model.plan import Guidance, PassPlan, Plan, Target, plan_request
from ltx_batch.model.sigmas import SchedulerConfig
from ltx_batch.model.slicing import Slices, are_thin
from ltx_batch.model.tiles import Tiles, choose_tiles
from ltx_batch.request import RenderRequest

VAE = {"encoder_bytes": int(1.293 * GIB), "decoder_bytes": int(1.030 * GIB), "upsampler_bytes": int(0.235 * GIB)}
# Weights of the 13B: 12.885 billion in 48 blocks, 0.158 billion beside them.
BF16 = ModelSizes((int(0.5 * GIB),) * 48, int(0.294 * GIB), channels=4096, number_bytes=2, **VAE)
INT8 = replace(BF16, blocks=(int(0.25 * GIB),) * 48, precision="int8")
# The 2B in bf16: 1.922 billion in 28 blocks.
SMALL = replace(BF16, blocks=(int(3.4 / 28 * GIB),) * 28, rest_bytes=int(0.13 * GIB), channels=2048)
PLAIN = replace(INT8, precision="int8-weight")  # int8 products in diffusers' own blocks hold as much
BNB = replace(INT8, precision="bnb-int8")
FP32 = replace(BF16, blocks=(GIB,) * 48, rest_bytes=int(0.588 * GIB), number_bytes=4, precision="fp32")
CONFIG = load_pipeline_config("ltxv-13b-0.9.8-distilled")


def planned(height: int, width: int, num_frames: int) -> Plan:
    """Two passes."""
    request = RenderRequest(prompt="a", height=height, width=width, num_frames=num_frames)
    return plan_request(request, CONFIG, SchedulerConfig())


def one_pass(height: int, width: int, num_frames: int, guidance: Guidance | None = None) -> Plan:
    one = PassPlan("pass1", height, width, num_frames, (1.0,), (guidance or Guidance(),))
    return Plan((one,), Target(height, width, num_frames), 30.0, 0.0, 0.05, 0.025)


def tokens_pass(tokens: int) -> PassPlan:
    """A pass of about so many tokens."""
    return PassPlan("pass1", 32, 32 * tokens, 1, (1.0,), (Guidance(),))


HD, UHD = planned(704, 1216, 121), planned(2160, 3840, 33)


def card(size_gib: float) -> Room:
    return Room(int(size_gib * GIB))


# against what an H100 allocated (docs/placement.md)


@pytest.mark.parametrize(
    ("sizes", "measured_gib"), [(BF16, 26.1), (BF16, 25.6), (PLAIN, 14.0), (BNB, 14.9), (FP32, 51.6)]
)
def test_a_step_of_the_13b_at_13376_tokens(sizes: ModelSizes, measured_gib: float) -> None:
    work = Work(one_pass(704, 1216, 121))
    assert work.plan.passes[0].tokens == 13_376
    found = sizes.transformer_bytes + memory.denoise_bytes(sizes, work.plan.passes[0], work)
    assert found / GIB == pytest.approx(measured_gib, rel=0.1)


@pytest.mark.parametrize(("tokens", "measured_gib"), [(4_180, 1.4), (13_376, 2.6), (22_400, 3.7), (40_800, 6.1)])
def test_a_step_with_streamed_blocks(tokens: int, measured_gib: float) -> None:
    work = Work(replace(one_pass(32, 32, 1), passes=(tokens_pass(tokens),)))
    placed = decide(PLAIN, work, Room(), "offload")
    assert placed.passes[0].kept_blocks == 0
    assert placed.peak_bytes / GIB == pytest.approx(measured_gib, rel=0.1)


@pytest.mark.parametrize(
    ("height", "width", "frames", "measured_gib"),
    [(704, 1216, 121, 12.2), (1440, 2560, 33, 14.1), (2176, 3840, 33, 28.9)],
)
def test_a_decode(height: int, width: int, frames: int, measured_gib: float) -> None:
    vae = BF16.encoder_bytes + BF16.decoder_bytes
    found = vae + memory.decode_bytes(BF16, height * width * frames)
    assert found / GIB == pytest.approx(measured_gib, rel=0.1)


def test_guidance_and_given_tokens_take_more() -> None:
    plain, guided = (one_pass(704, 1216, 121, Guidance(guidance_scale=scale)) for scale in (1.0, 3.0))
    alone, both, pair, given = (
        memory.denoise_bytes(BF16, work.plan.passes[0], work)
        for work in (Work(plain), Work(guided), Work(plain, rows=2), Work(plain, conditioned=True))
    )
    assert both == pair, "rows are rows"
    assert alone < both < 2 * alone, "the rotary tables are shared"
    assert given == pytest.approx(1.78 * alone, rel=0.02)


# tiles


@pytest.mark.parametrize("height", [192, 704, 896, 2880])
@pytest.mark.parametrize("width", [224, 1216, 5056])
@pytest.mark.parametrize("limit", [1, 10**5, 10**6, 10**8])
def test_tiles_cover_a_picture_and_keep_to_the_limit(height: int, width: int, limit: int) -> None:
    tiles = choose_tiles(height, width, limit)
    if tiles is None:
        assert height * width <= limit
        return
    assert height * width > limit and tiles.height % 32 == tiles.width % 32 == 0
    assert tiles.pixels <= max(limit, 224 * 256)
    for starts, side, length in zip(
        tiles.grid(height, width), (tiles.height, tiles.width), (height, width), strict=True
    ):
        ends = [min(start + side, length) for start in starts]
        assert starts[0] == 0 and ends[-1] == length
        assert all(end - start == tiles.overlap for start, end in zip(starts[1:], ends[:-1], strict=True))
        assert all(end - start > tiles.overlap for start, end in zip(starts, ends, strict=True))


def test_tiles_are_the_largest_that_fit() -> None:
    assert choose_tiles(896, 1600, 896 * 1600) is None
    assert choose_tiles(896, 1600, 896 * 1600 - 1) == Tiles(896, 832)
    assert choose_tiles(896, 1600, 400_000) == Tiles(480, 832)


# decisions


def sliced(sizes: ModelSizes, plan: Plan, size_gib: float) -> Slices:
    slices = decide(sizes, Work(plan), card(size_gib)).decode_slices
    assert slices is not None
    return slices


def test_a_large_video_waits_in_host_memory() -> None:
    assert not sliced(INT8, HD, 11.0).to_host and sliced(INT8, HD, 5.0).to_host


@pytest.mark.parametrize(
    ("sizes", "plan", "size_gib", "mode", "cut", "chunks"),
    [
        (BF16, HD, 79.4, "resident", False, False),
        (BF16, HD, 47.4, "resident", False, False),
        (BF16, HD, 23.4, "offload", False, False),
        (INT8, HD, 23.4, "resident", True, False),
        (INT8, HD, 15.4, "offload", True, False),
        (INT8, HD, 7.1, "offload", True, False),
        (INT8, HD, 5.1, "offload", True, False),
        (INT8, HD, 3.1, "offload", True, False),
        (SMALL, HD, 11.1, "resident", True, False),
        (SMALL, HD, 3.1, "offload", True, False),
        (INT8, UHD, 79.4, "resident", False, False),
        (INT8, UHD, 47.4, "resident", True, False),
        (INT8, UHD, 11.1, "offload", True, False),
        (INT8, UHD, 7.1, "offload", True, False),
        (INT8, UHD, 6.5, "offload", True, True),
    ],
)
def test_the_first_that_fits(
    sizes: ModelSizes, plan: Plan, size_gib: float, mode: str, cut: bool, chunks: bool
) -> None:
    room = card(size_gib)
    found = decide(sizes, Work(plan), room)
    assert (found.mode, found.decode_slices is not None, found.degraded) == (mode, cut, False)
    assert any(one.chunk_tokens for one in found.passes) is chunks
    assert found.fits and found.peak_bytes <= room.usable[0]
    assert room.told in found.reason
    assert (f"decoded in {found.decode_slices}" in found.reason) is cut


@pytest.mark.parametrize(
    ("sizes", "plan", "size_gib", "columns"),
    [(INT8, HD, 7.1, 75), (INT8, HD, 5.1, 50), (SMALL, HD, 3.1, 22), (INT8, UHD, 11.1, 75), (INT8, UHD, 7.1, 75)],
)
def test_slices_are_as_large_as_fit(sizes: ModelSizes, plan: Plan, size_gib: float, columns: int) -> None:
    """Four columns of each are worked out twice."""
    last = plan.passes[-1]
    assert sliced(sizes, plan, size_gib).work_bytes >= memory.columns_bytes(sizes, last, columns)


def test_thin_slices_only_where_nothing_else_fits() -> None:
    last = HD.passes[-1]
    denoise, gap = memory.denoise_bytes(SMALL, last, Work(HD)), memory.largest_bytes(SMALL, last, Work(HD))
    room = Room(int((SMALL.weights_bytes + 1.01 * denoise + gap) / memory.PREDICTED))
    resident = decide(SMALL, Work(HD), room, "resident")
    assert resident.fits and are_thin(SMALL, last, resident.decode_slices)
    assert decide(SMALL, Work(HD), room).mode == "offload"


def test_a_decoder_that_draws_noise_is_degraded_by_slices() -> None:
    noisy = replace(INT8, noisy_decoder=True)
    assert decide(noisy, Work(HD), card(7.1)).degraded
    assert decide(noisy, Work(HD), card(23.4)).mode == "offload", "uncut is better, where it fits"
    assert not decide(noisy, Work(HD), card(79.4)).degraded


def test_as_many_blocks_stay_as_fit() -> None:
    first, second = decide(INT8, Work(HD), card(7.4)).passes
    assert first.kept_blocks > second.kept_blocks > 0, "the second pass has four times the tokens"
    sizes = [decide(INT8, Work(HD), card(size)).passes[1].kept_blocks for size in (5, 7, 9, 11, 13, 15, 20)]
    assert sizes == sorted(sizes) and sizes[-1] == 48
    assert 46 not in sizes and 47 not in sizes, "two slots cost as much as the blocks that they are for"


@pytest.mark.parametrize("size_gib", [5.1, 7.1, 11.1])
def test_blocks_that_stay_leave_a_gap_for_the_largest_tensor(size_gib: float) -> None:
    room, (_, one) = card(size_gib), HD.passes
    kept = decide(INT8, Work(HD), room, "offload").passes[1].kept_blocks
    activations, gap = (count(INT8, one, Work(HD)) for count in (memory.denoise_bytes, memory.largest_bytes))
    wanted = [INT8.rest_bytes + (count + 2) * INT8.blocks[0] + activations for count in range(47)]
    assert 0 < kept < 46 and wanted[kept] + gap <= memory.PREDICTED * size_gib * GIB < wanted[kept + 1] + gap
    assert wanted[kept + 1] <= room.usable[0], "not only for want of room"


def test_all_blocks_stay_only_beside_such_a_gap() -> None:
    denoise, gap = (count(INT8, UHD.passes[1], Work(UHD)) for count in (memory.denoise_bytes, memory.largest_bytes))
    enough = int((INT8.weights_bytes + denoise + gap) / memory.PREDICTED)
    modes = [decide(INT8, Work(UHD), Room(enough + more)).mode for more in (-(2**20), 2**20)]
    assert modes == ["offload", "resident"]
    assert decide(INT8, Work(UHD), Room(enough - 2**20), "resident").fits, "who asks for it may have it"


def test_blocks_of_two_sizes_are_counted_each_and_large_ones_stay_first() -> None:
    ends = (int(0.5 * GIB),) * 3
    mixed = replace(INT8, blocks=(*ends, *INT8.blocks[6:], *ends))
    assert mixed.transformer_bytes - INT8.transformer_bytes == pytest.approx(1.5 * GIB, rel=0.01)
    large = {0, 1, 2, 45, 46, 47}
    assert staying(mixed.blocks, 2) < large and len(staying(mixed.blocks, 2)) == 2
    assert staying(mixed.blocks, 6) == large < staying(mixed.blocks, 20)
    assert len(staying(mixed.blocks, 20)) == 20 and staying(mixed.blocks, 48) == set(range(48))
    assert staying(INT8.blocks, 3) == {15, 31, 47}, "evenly apart"
    kept = [decide(sizes, Work(HD), card(9.4)).passes[1].kept_blocks for sizes in (INT8, mixed)]
    assert kept[0] == kept[1] + 6, "six blocks take the place of twelve"


def test_blocks_make_room_for_a_decode_and_no_more_than_must() -> None:
    placed = decide(INT8, Work(HD), card(23.4), "offload")
    staying = placed.beside["decode"]
    assert placed.passes[1].kept_blocks == 48 and staying is not None and 0 < staying < 48
    assert placed.beside["upsample"] == 48, "which wants little"
    assert decide(INT8, Work(HD), card(23.4), strain=Strain(2)).beside["decode"] is None


def test_what_fits_nowhere_says_so() -> None:
    found = decide(BF16, Work(UHD), card(3.0))
    assert (found.mode, found.fits) == ("offload", False)
    assert found.peak_bytes > 3 * GIB


def test_a_name_is_obeyed() -> None:
    assert decide(BF16, Work(HD), card(20.0), "resident").mode == "resident"
    assert not decide(BF16, Work(HD), card(20.0), "resident").fits
    assert decide(BF16, Work(HD), card(80.0), "offload").mode == "offload"
    assert decide(BF16, Work(HD), Room(), "auto").mode == "resident", "a CPU has one memory"
    with pytest.raises(JobError, match="unknown placement 'ofload'; what works: auto, resident, offload, sharded"):
        check_name("ofload")


def test_long_input_media_are_encoded_in_tiles() -> None:
    found = decide(INT8, Work(HD, encoded_frames=121), card(9.0))
    assert found.encode_tiles[1] is not None and found.degraded
    assert found.fits
    assert decide(INT8, Work(HD, encoded_frames=1), card(9.0)).encode_tiles == ()


# several GPUs


def test_blocks_are_dealt_where_there_is_room() -> None:
    pair = Room(15 * GIB, (15 * GIB,))
    found = decide(BF16, Work(one_pass(704, 1216, 121)), pair, "sharded")
    assert sum(found.shards) == 48 and found.fits
    assert decide(BF16, Work(one_pass(704, 1216, 121)), Room(25 * GIB, (15 * GIB,)), "sharded").shards == (31, 17)
    assert decide(BF16, Work(HD), Room(28 * GIB, (28 * GIB,))).mode == "sharded", "where one alone is not enough"
    assert decide(BF16, Work(HD), Room(79 * GIB, (79 * GIB,))).mode == "resident"
    assert not decide(BF16, Work(HD), Room(10 * GIB, (10 * GIB,)), "sharded").fits


# out of memory


def test_a_decode_steps_down_to_smaller_and_smaller_slices() -> None:
    work, strain, seen = Work(HD), Strain(), []
    while True:
        placed = decide(BF16, work, card(79.4), strain=strain)
        assert placed.mode == "resident", "the denoising needs no change"
        stepped = step_down(BF16, strain, "decode", placed, work)
        if stepped is None:
            break
        strain = stepped
        slices = decide(BF16, work, card(79.4), strain=strain).decode_slices
        assert slices is not None and slices.to_host
        seen.append(slices.work_bytes)
    assert len(seen) > 3 and all(after < before for before, after in pairwise(seen))
    assert seen[-1] < memory.columns_bytes(BF16, HD.passes[-1], 2), "of which no column is done"


def test_other_stages_step_down_one_placement_at_a_time() -> None:
    work, strain = Work(HD), Strain()
    seen: list[Placement] = []
    while strain is not None:
        seen.append(decide(INT8, work, card(40), strain=strain))
        stepped = step_down(INT8, strain, "denoise", seen[-1], work)
        if stepped is None:
            break
        strain = stepped
    assert [placed.mode for placed in seen] == ["resident", "offload", "offload", "offload"]
    assert [placed.passes[0].kept_blocks for placed in seen] == [48, 48, 0, 0]
    assert [placed.passes[0].chunk_tokens for placed in seen] == [None, None, None, memory.CHUNK_TOKENS]
    assert "memory ran out" in seen[-1].reason
    peaks = [placed.peak_bytes for placed in seen[1:]]
    assert peaks == sorted(peaks, reverse=True)


def test_needs_bound_what_is_decided() -> None:
    most, least = needs(INT8, Work(HD))
    assert decide(INT8, Work(HD), Room(int(1.1 * most))).mode == "resident"
    assert decide(INT8, Work(HD), Room(int(1.1 * least))).fits
    assert not decide(INT8, Work(HD), Room(int(0.9 * least))).fits


def test_a_placement_is_decided_without_torch() -> None:
    script = "import sys, ltx_batch.model.placement; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.lower()) is False
