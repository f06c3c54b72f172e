"""Official pipeline YAML files."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltx_batch.errors import JobError
from ltx_batch.model.pipeline_config import (
    PipelineConfig,
    load_pipeline_config,
    parse_pipeline_config,
)
from ltx_batch.model.presets import PRESETS

DISTILLED = """
pipeline_type: base
checkpoint_path: "ltxv-2b-0.9.6-distilled-04-25.safetensors"
guidance_scale: 1
stg_scale: 0
rescaling_scale: 1
num_inference_steps: 8
stg_mode: "attention_values"
decode_timestep: 0.05
decode_noise_scale: 0.025
text_encoder_model_name_or_path: "PixArt-alpha/PixArt-XL-2-1024-MS"
precision: "bfloat16"
sampler: "from_checkpoint"
prompt_enhancement_words_threshold: 120
prompt_enhancer_image_caption_model_name_or_path: "MiaoshouAI/Florence-2-large-PromptGen-v2.0"
prompt_enhancer_llm_model_name_or_path: "unsloth/Llama-3.2-3B-Instruct"
stochastic_sampling: false
"""


def test_an_official_base_file_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "official.yaml"
    file.write_text(DISTILLED)
    config = load_pipeline_config(str(file))
    assert (config.guidance_scale, config.num_inference_steps, config.decode_noise_scale) == (1.0, 8, 0.025)
    assert config.checkpoint_path == "ltxv-2b-0.9.6-distilled-04-25.safetensors"


def test_the_named_file_wins_over_the_folder_and_that_over_the_defaults(tmp_path: Path) -> None:
    assert (
        load_pipeline_config(None, tmp_path) == load_pipeline_config(None) == PipelineConfig(decode_noise_scale=0.025)
    )
    (tmp_path / "pipeline_config.yaml").write_text("timesteps: [1.0, 0.5]")
    assert load_pipeline_config(None, tmp_path).timesteps == (1.0, 0.5)
    other = tmp_path / "other.yaml"
    other.write_text("timesteps: [1.0, 0.25]")
    assert load_pipeline_config(str(other), tmp_path).timesteps == (1.0, 0.25)


def test_defaults_are_those_of_the_official_base_configs() -> None:
    config = load_pipeline_config(None)
    assert (config.pipeline_type, config.guidance_scale, config.num_inference_steps) == ("base", 3.0, 40)
    assert (config.decode_timestep, config.decode_noise_scale, config.image_cond_noise_scale) == (0.05, 0.025, 0.15)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("guidence_scale: 3", "guidence_scale: unknown key; did you mean guidance_scale?"),
        ("first_pass: {timestep: [1.0]}", "first_pass.timestep: unknown key; did you mean timesteps?"),
        ("decode_timestep: 2", "decode_timestep: .*less than or equal to 1.*found 2"),
        ("timesteps: [1000, 500]", "divide by 1000"),
        ("timesteps: [0.5, 0.7]", "must fall from step to step, found 0.5 and then 0.7"),
        ("timesteps: [1.0, 0.0]", "the final 0 is added"),
        ("timesteps: []", "must not be empty"),
        ("- a", "must hold a mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_faults_say_what_to_do(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(text)
    with pytest.raises(JobError, match=message):
        load_pipeline_config(str(file))


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(JobError) as caught:
        parse_pipeline_config({"guidance_scale": "much", "sampler": "euler", "steps": 3}, source="x.yaml")
    lines = str(caught.value).splitlines()
    assert lines[0] == "x.yaml has 3 fault(s):"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["guidance_scale", "sampler", "steps"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"stg_scale": [0, 0, 4], "guidance_timesteps": [1.0, 0.99]},
            "stg_scale: has 3 entries, and guidance_timesteps has 2",
        ),
        ({"skip_block_list": [[1], []]}, "skip_block_list: has 2 entries, and guidance_timesteps has 0"),
        (
            {"guidance_timesteps": [0.5, 1.0], "guidance_scale": [1, 3]},
            "guidance_timesteps: must fall from entry to entry, found 0.5 and then 1",
        ),
        ({"guidance_timesteps": [1.0, 1.0], "guidance_scale": [1, 3]}, "guidance_timesteps: must fall"),
        ({"pipeline_type": "multi-scale", "first_pass": {}}, "needs both first_pass and second_pass"),
        ({"stg_mode": "stg_x"}, "stg_mode: .*found 'stg_x'"),
        ({"downscale_factor": 1.5}, "downscale_factor: .*less than or equal to 1"),
    ],
)
def test_what_does_not_fit_together_is_told(data: dict[str, object], message: str) -> None:
    with pytest.raises(JobError, match=message):
        parse_pipeline_config(data, source="x.yaml")


def test_faults_of_tables_name_their_pass_and_come_at_once() -> None:
    first = {"guidance_timesteps": [0.5, 1.0], "stg_scale": [1, 2, 3]}
    data = {"pipeline_type": "multi-scale", "first_pass": first, "second_pass": {"guidance_scale": [1]}}
    with pytest.raises(JobError) as caught:
        parse_pipeline_config(data, source="x.yaml")
    assert str(caught.value).splitlines() == [
        "x.yaml has 3 fault(s):",
        "  first_pass.guidance_timesteps: must fall from entry to entry, found 0.5 and then 1",
        "  first_pass.stg_scale: has 3 entries, and guidance_timesteps has 2",
        "  second_pass.guidance_scale: has 1 entries, and guidance_timesteps has 0",
    ]


def test_a_key_that_is_there_twice_is_told_with_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text("first_pass:\n  stg_scale: 1\n  stg_scale: 2\nsampler: uniform\nsampler: uniform\n")
    with pytest.raises(
        JobError, match=r"line 3: first_pass\.stg_scale is there already, in line 2; line 5: sampler is"
    ):
        load_pipeline_config(str(file))


def test_tables_of_a_pass_may_lean_on_what_stands_beside_the_passes() -> None:
    data = {
        "pipeline_type": "multi-scale",
        "guidance_timesteps": [1.0, 0.5],
        "guidance_scale": 2,
        "first_pass": {"guidance_scale": [1, 6]},
        "second_pass": {"cfg_star_rescale": True},
    }
    first, second = parse_pipeline_config(data, source="x.yaml").passes
    assert (first.guidance_scale, second.guidance_scale) == ((1.0, 6.0), 2.0)
    assert (first.cfg_star_rescale, second.cfg_star_rescale) == (False, True)


@pytest.mark.parametrize("short", ["stg_av", "STG_AV", "Attention_Values"])
def test_short_names_of_the_modes_are_known(short: str) -> None:
    assert parse_pipeline_config({"stg_mode": short}, source="x.yaml").stg_mode == "attention_values"


@pytest.mark.parametrize("name", ["LinearQuadratic", "linear-quadratic"])
def test_samplers_are_known_as_the_official_code_spells_them(name: str) -> None:
    assert parse_pipeline_config({"sampler": name}, source="x.yaml").sampler == "linear-quadratic"


def test_tables_are_looked_up_in_float32_as_the_official_code_does() -> None:
    one = parse_pipeline_config(
        {"guidance_scale": [1, 2, 3], "guidance_timesteps": [1.0, 0.985, 0.5]}, source="x.yaml"
    ).passes[0]
    nearly = 1 - 9 * 0.025 / 15 - 1e-9  # below 0.985 in float64, the same float32
    assert one.scale_at(one.guidance_scale, nearly) == 2
    assert one.scale_at(one.guidance_scale, 0.98) == 3
    assert one.scale_at(one.guidance_scale, 0.1) == 3, "below the last entry that one holds"


def test_blocks_may_be_one_some_or_a_table() -> None:
    def at(blocks: object, sigma: float) -> tuple[int, ...]:
        data = {"skip_block_list": blocks, "guidance_timesteps": [1.0, 0.5]}
        return parse_pipeline_config(data, source="x.yaml").passes[0].blocks_at(sigma)

    assert [at(blocks, 0.7) for blocks in (7, [7, 8], [], [[], [7, 9]], None)] == [(7,), (7, 8), (), (7, 9), ()]
    assert at([[], [7, 9]], 1.0) == ()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_config_by_its_name(name: str) -> None:
    config = load_pipeline_config(name)
    assert config == parse_pipeline_config(dict(PRESETS[name]), source=name)
    assert config.checkpoint_path is not None
    assert len(config.passes) == (1 if "0.9.8" not in name and "0.9.7" not in name else 2)
    assert config.resolve_precision() == ("fp8" if name.endswith("fp8") else "bf16")


def test_the_values_that_tell_the_presets_apart() -> None:
    distilled, dev = load_pipeline_config("ltxv-13b-0.9.8-distilled"), load_pipeline_config("ltxv-13b-0.9.8-dev")
    assert [len(one.timesteps or ()) for one in distilled.passes] == [7, 3]
    assert distilled.passes[1].tone_map_compression_ratio == 0.6
    assert load_pipeline_config("ltxv-2b-0.9.8-distilled").passes[1].tone_map_compression_ratio == 0
    assert [one.num_inference_steps for one in dev.passes] == [30, 30]
    assert dev.passes[0].blocks() == {22, 28, 35, 39}  # the blocks 11 and 25 stand where stg_scale is 0
    assert dev.passes[1].blocks() == {27}
    assert load_pipeline_config("ltxv-2b-0.9.6-distilled").stochastic_sampling


def test_a_near_name_is_asked_about() -> None:
    with pytest.raises(JobError, match=r"did you mean ltxv-13b-0\.9\.8-distilled\?") as caught:
        load_pipeline_config("ltxv-13b-0.9.8-destilled")
    assert all(name in str(caught.value) for name in PRESETS)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no pipeline config at"):
        load_pipeline_config(str(tmp_path / "none.yaml"))
