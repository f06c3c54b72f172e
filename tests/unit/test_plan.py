"""Plans: sizes, sigmas and defaults of a request, decided without torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ltx_batch.errors import InvalidRow
from ltx_batch.model.pipeline_config import PipelineConfig, load_pipeline_config
from ltx_batch.model.plan import Plan, pad_frames, pad_size, plan_request
from ltx_batch.model.sigmas import SchedulerConfig
from ltx_batch.request import Condition, RenderRequest

REQUEST = RenderRequest(prompt="a red circle", height=128, width=128, num_frames=17)


def plan(config: dict[str, Any] | None = None, **changes: Any) -> Plan:
    return plan_request(replace(REQUEST, **changes), PipelineConfig.model_validate(config or {}), SchedulerConfig())


@pytest.mark.parametrize(("pixels", "padded"), [(32, 32), (33, 64), (60, 64), (704, 704), (720, 736), (1080, 1088)])
def test_sizes_are_padded_to_multiples_of_32(pixels: int, padded: int) -> None:
    assert pad_size(pixels) == padded


@pytest.mark.parametrize(
    ("frames", "padded"), [(1, 1), (2, 9), (9, 9), (10, 17), (16, 17), (17, 17), (120, 121), (121, 121)]
)
def test_frames_are_raised_to_8k_plus_1(frames: int, padded: int) -> None:
    assert pad_frames(frames) == padded


def test_the_pad_is_centred_and_its_odd_pixel_lies_below() -> None:
    found = plan(height=60, width=90, num_frames=12)
    one = found.passes[0]
    assert (one.height, one.width, one.num_frames) == (64, 96, 17)
    assert found.target.pads == (3, 3, 2, 2)
    assert (found.target.height, found.target.width, found.target.num_frames) == (60, 90, 12)


def test_tokens_are_those_of_the_official_grid() -> None:
    assert plan(height=704, width=1216, num_frames=121).passes[0].latent_size == (16, 22, 38)
    assert plan(height=704, width=1216, num_frames=121).passes[0].tokens == 13_376


def test_a_field_that_is_none_takes_the_configs_value() -> None:
    config = {
        "timesteps": [1.0, 0.5],
        "guidance_scale": 2.5,
        "decode_timestep": 0.1,
        "decode_noise_scale": 0.2,
        "image_cond_noise_scale": 0.3,
    }
    found = plan(config)
    assert found.passes[0].sigmas == (1.0, 0.5)
    assert [step.guidance_scale for step in found.passes[0].guidance] == [2.5, 2.5]
    assert (found.decode_timestep, found.decode_noise_scale, found.image_cond_noise_scale) == (0.1, 0.2, 0.3)


def test_a_request_wins_over_the_config_also_with_zero() -> None:
    config = {"timesteps": [1.0, 0.5], "guidance_scale": 2.5}
    found = plan(
        config,
        timesteps=(1.0, 0.7, 0.3),
        guidance_scale=1.0,
        decode_timestep=0.0,
        decode_noise_scale=0.0,
        image_cond_noise_scale=0.0,
    )
    assert found.passes[0].sigmas == (1.0, 0.7, 0.3)
    assert not found.needs_negative
    assert (found.decode_timestep, found.decode_noise_scale, found.image_cond_noise_scale) == (0, 0, 0)


def test_steps_of_a_request_replace_timesteps_of_the_config() -> None:
    assert plan({"timesteps": [1.0, 0.5]}, num_inference_steps=7).passes[0].calls == 7


def test_a_clip_that_begins_from_noise_should_begin_at_1() -> None:
    for found in (plan(timesteps=(0.9, 0.5)), plan({"timesteps": [0.9, 0.5]})):
        (doubt,) = found.doubts
        assert doubt.columns == ("timesteps",) and doubt.rule.startswith("the first timestep is 0.9 and there is no")
    assert plan(timesteps=(0.9, 0.5), input_media=Condition("a.mp4")).doubts == ()
    assert plan(timesteps=(1.0, 0.5)).doubts == () == plan().doubts


def test_decode_noise_follows_the_decode_timestep_where_the_config_says_null() -> None:
    assert plan({"decode_noise_scale": None}, decode_timestep=0.07).decode_noise_scale == 0.07


def test_tables_are_looked_up_at_each_sigma() -> None:
    config = {"timesteps": [1.0, 0.99, 0.9, 0.5], "guidance_scale": [1, 6, 8], "guidance_timesteps": [1.0, 0.95, 0.8]}
    assert [step.guidance_scale for step in plan(config).passes[0].guidance] == [1, 6, 8, 8]
    assert [step.rows for step in plan(config).passes[0].guidance] == [1, 2, 2, 2]
    assert [step.guidance_scale for step in plan(config, guidance_scale=4.0).passes[0].guidance] == [4, 4, 4, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": (0.5, 0.5)}, "must fall from step to step, found 0.5 and then 0.5"),
        ({"timesteps": (1000.0, 500.0)}, "divide by 1000"),
        ({"timesteps": ()}, "must not be empty"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"stg_scale": 1.0}, "stg_scale above 0 needs skip_block_list"),
        ({"timesteps": (1.0, 0.5), "num_inference_steps": 2}, "num_inference_steps and timesteps exclude each other"),
        ({"input_media": Condition("a.mp4")}, "input_media would be drowned in noise: the first timestep is 1"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"height": 0}, "height must be above 0"),
        ({"frame_rate": 0.0}, "frame_rate must be above 0"),
        ({"conditions": (Condition("a.png", 17),)}, "starts at frame 17; the clip has frames 0 to 16"),
        ({"conditions": (Condition("a.png", -1),)}, "starts at frame -1"),
        ({"conditions": (Condition("a.png", 0, 1.5),)}, "strength must be in 0..1"),
    ],
)
def test_what_only_the_model_knows_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRow, match=message):
        plan(**changes)


def preset(name: str, **changes: Any) -> Plan:
    sizes = {"height": 704, "width": 1216, "num_frames": 121}
    return plan_request(replace(REQUEST, **{**sizes, **changes}), load_pipeline_config(name), SchedulerConfig())


def test_a_distilled_multi_scale_plan_makes_7_and_3_calls() -> None:
    first, second = preset("ltxv-13b-0.9.8-distilled").passes
    assert (first.height, first.width, first.tokens, first.calls, first.row_forwards) == (448, 800, 5_600, 7, 7)
    assert (second.height, second.width, second.tokens, second.calls, second.row_forwards) == (896, 1600, 22_400, 3, 3)
    assert (first.name, second.name) == ("pass1", "pass2")


def test_a_dev_multi_scale_plan_asks_in_rows_as_its_tables_say() -> None:
    first, second = preset("ltxv-13b-0.9.8-dev").passes
    assert (first.calls, first.row_forwards, second.calls, second.row_forwards) == (27, 62, 13, 26)
    assert [step.rows for step in first.guidance[:5]] == [1, 1, 1, 3, 3]
    assert first.guidance[3].skip_blocks == (22, 35, 39)
    assert second.guidance[0].skip_blocks == (27,)
    assert second.sigmas[0] == pytest.approx(0.954768, abs=1e-4)


@pytest.mark.parametrize(
    ("size", "low"),
    [((128, 128), (64, 64)), ((256, 160), (160, 96)), ((256, 256), (160, 160)), ((2160, 3840), (1440, 2528))],
)
def test_the_first_pass_is_rounded_down_and_the_second_is_twice_it(size: tuple[int, int], low: tuple[int, int]) -> None:
    first, second = preset("ltxv-13b-0.9.8-distilled", height=size[0], width=size[1], num_frames=33).passes
    assert (first.height, first.width) == low
    assert (second.height, second.width) == (2 * low[0], 2 * low[1])


def test_scalars_of_a_row_replace_the_tables_of_both_passes() -> None:
    found = preset("ltxv-13b-0.9.8-dev", guidance_scale=2.0, stg_scale=0.0, num_inference_steps=24)
    assert {(step.guidance_scale, step.stg_scale) for one in found.passes for step in one.guidance} == {(2.0, 0.0)}
    assert [one.calls for one in found.passes] == [21, 7]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ltxv-13b-0.9.8-dev", {"timesteps": (1.0, 0.5)}, "cannot serve both passes of a multi-scale pipeline"),
        ("ltxv-13b-0.9.8-distilled", {"num_inference_steps": 4}, "cannot replace the timesteps of a multi-scale"),
        (
            "ltxv-13b-0.9.8-dev",
            {"num_inference_steps": 12},
            "num_inference_steps 12: 17 at the start and 0 at the end are skipped",
        ),
        ("ltxv-13b-0.9.8-dev", {"height": 32}, "1216x32 is too small for a multi-scale pipeline.*at least 64x64"),
        ("ltxv-13b-0.9.8-dev", {"input_media": Condition("a.mp4")}, "input_media would be drowned in noise"),
    ],
)
def test_what_a_multi_scale_pipeline_cannot_do_is_told(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRow, match=message):
        preset(name, **changes)


def test_skipped_first_steps_need_a_video_to_begin_from() -> None:
    config = {"num_inference_steps": 10, "skip_initial_inference_steps": 6}
    with pytest.raises(InvalidRow, match="skip_initial_inference_steps needs input_media"):
        plan(config)
    assert plan(config, input_media=Condition("a.mp4")).passes[0].calls == 4


def test_a_distilled_checkpoint_takes_no_other_timesteps() -> None:
    allowed = SchedulerConfig(allowed_inference_steps=(1.0, 0.9937, 0.725))
    config = PipelineConfig.model_validate({"timesteps": [1.0, 0.99372, 0.725]})
    assert plan_request(REQUEST, config, allowed).passes[0].calls == 3
    with pytest.raises(InvalidRow, match=r"timesteps 1, 0\.9937, 0\.725 alone, found 0\.5"):
        plan_request(replace(REQUEST, timesteps=(1.0, 0.5)), config, allowed)


def test_steps_at_one_entry_of_a_table_share_their_guidance() -> None:
    config = {"num_inference_steps": 30, "guidance_scale": [1, 6], "guidance_timesteps": [1.0, 0.95]}
    steps = plan(config).passes[0]
    assert len(steps.guidance) == 30 and len(set(map(id, steps.guidance))) == 2
    assert all(one.guidance_scale == (1 if s == 1 else 6) for one, s in zip(steps.guidance, steps.sigmas, strict=True))
