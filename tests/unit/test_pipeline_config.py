"""Official pipeline YAML files."""

from __future__ import annotations

from pathlib import Path

import pytest

from ltx_batch.errors import JobError
from ltx_batch.model.pipeline_config import PipelineConfig, load_pipeline_config, parse_pipeline_config

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
    assert load_pipeline_config(None, tmp_path) == load_pipeline_config(None) == PipelineConfig.model_validate({})
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
    "text",
    [
        {"pipeline_type": "multi-scale", "first_pass": {"timesteps": [1.0]}, "second_pass": {"timesteps": [0.9]}},
        {"stg_scale": 1},
        {"stg_scale": [0, 0, 4], "guidance_timesteps": [1.0, 0.99, 0.5]},
        {"stochastic_sampling": True},
        {"cfg_star_rescale": True},
        {"skip_final_inference_steps": 3},
        {"precision": "float8_e4m3fn"},
    ],
    ids=lambda text: next(iter(text)),
)
def test_what_is_not_built_is_refused_and_not_ignored(text: dict[str, object]) -> None:
    with pytest.raises(JobError, match=f"not built yet: {next(iter(text))}"):
        parse_pipeline_config(text, source="x.yaml")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="no pipeline config at"):
        load_pipeline_config(str(tmp_path / "none.yaml"))
