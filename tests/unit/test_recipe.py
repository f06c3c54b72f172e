"""The recipe: what a job adds to keys, and what it leaves out because no pixel hangs on it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from ltx_batch.job import parse_job
from ltx_batch.model.expected import config_sha256
from ltx_batch.model.pipeline_config import load_pipeline_config, parse_pipeline_config
from ltx_batch.model.presets import PRESETS
from ltx_batch.recipe import make_recipe, with_precision
from ltx_batch.renderer import PACKAGED

DEMO = PACKAGED / "demo"


def recipe(**model: Any) -> dict[str, Any]:
    return make_recipe(parse_job({"manifest": "m", "output": "o", "model": {"checkpoint": "demo", **model}}))


def test_a_plain_recipe_holds_no_more_than_it_must() -> None:
    plain = recipe()
    assert plain.keys() == {"schema", "precision", "condition_preprocess", "video", "checkpoint"}
    assert "pipeline_config.yaml" in plain["checkpoint"]["files"], "the checkpoint's own holds"


# precisions


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_bends_a_quantisation_is_left_out_where_nothing_is_quantised(precision: str) -> None:
    bent = {"skip_modules": ["ff"], "hadamard_group": 256, "keep_blocks": 1, "llm_int8_threshold": 6.0}
    assert recipe(precision=precision, **bent) == recipe(precision=precision)
    assert with_precision(recipe(**bent), precision) == recipe(precision=precision)


@pytest.mark.parametrize(
    ("precision", "bent", "counts"),
    [
        ("int8", {"skip_modules": ["ff"]}, True),
        ("int8", {"keep_blocks": 0}, True),
        ("int8", {"hadamard_group": 0}, True),
        ("int8", {"hadamard_group": 64}, False),  # the default by its value
        ("int8", {"llm_int8_threshold": 6.0}, False),
        ("int8-weight", {"hadamard_group": 0}, False),
        ("int8-weight", {"keep_blocks": 0}, True),
        ("fp8", {"hadamard_group": 0}, False),
        ("fp8", {"skip_modules": ["ff"]}, True),
        ("bnb-int8", {"llm_int8_threshold": 6.0}, True),
        ("bnb-int8", {"hadamard_group": 0}, False),
    ],
)
def test_a_key_counts_where_its_precision_heeds_it(precision: str, bent: dict[str, Any], counts: bool) -> None:
    assert (recipe(precision=precision, **bent) != recipe(precision=precision)) is counts
    assert (with_precision(recipe(**bent), precision) != with_precision(recipe(), precision)) is counts


def test_auto_keeps_what_may_yet_count() -> None:
    assert recipe(llm_int8_threshold=6.0, hadamard_group=0)["llm_int8_threshold"] == 6.0


def test_the_text_encoders_precision_counts_where_it_is_asked_for() -> None:
    assert recipe(text_precision="auto") == recipe()
    assert recipe(text_precision="int8") == {**recipe(), "text_precision": "int8"}


def test_a_kernel_of_attention_counts_where_it_is_asked_for() -> None:
    plain, auto, native, sage = (
        recipe(**({"attention": name} if name else {})) for name in ("", "auto", "native", "sage")
    )
    assert plain == auto and "attention" not in plain
    assert (native["attention"], sage["attention"]) == ("native", "sage")


# pipeline configs


def test_a_comment_or_another_spelling_of_a_config_changes_nothing(tmp_path: Path) -> None:
    texts = [
        "timesteps: [1.0, 0.7]\nguidance_scale: 3\nstg_mode: stg_av\n",
        "# tuned in March\nstg_mode: Attention_Values\nguidance_scale: 3.0\ntimesteps:\n- 1\n- 0.7\n",
        # Where weights lie, what resolves `auto` and what rewrites prompts has its own place, or none.
        "timesteps: [1, 0.7]\nprecision: float8_e4m3fn\nprompt_enhancement_words_threshold: 3\nstg_scale: 0\n",
    ]
    found = []
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.yaml").write_text(text)
        found.append(recipe(pipeline_config=str(tmp_path / f"{number}.yaml")))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "text",
    [
        "timesteps: [1.0, 0.6]",
        "timesteps: [1.0, 0.7]\nguidance_scale: 4",
        "timesteps: [1.0, 0.7]\nstg_mode: stg_as",
        "timesteps: [1.0, 0.7]\nsampler: uniform",
        "timesteps: [1.0, 0.7]\nstochastic_sampling: true",
        "timesteps: [1.0, 0.7]\ndecode_timestep: 0.1",
        "timesteps: [1.0, 0.7]\ndecode_noise_scale: 0.1",
        "timesteps: [1.0, 0.7]\nimage_cond_noise_scale: 0.1",
        "timesteps: [1.0, 0.7]\ntone_map_compression_ratio: 0.5",
        "timesteps: [1.0, 0.7]\nskip_block_list: [1]",
    ],
)
def test_every_value_that_changes_a_picture_counts(text: str, tmp_path: Path) -> None:
    for name, content in (("plain", "timesteps: [1.0, 0.7]"), ("other", text)):
        (tmp_path / f"{name}.yaml").write_text(content)
    plain, other = (load_pipeline_config(str(tmp_path / f"{name}.yaml")) for name in ("plain", "other"))
    assert config_sha256(plain) != config_sha256(other)


def test_passes_count_as_they_will_run() -> None:
    def sha256(**values: Any) -> str:
        both = {"pipeline_type": "multi-scale", "first_pass": {}, "second_pass": {}}
        return config_sha256(parse_pipeline_config({**both, **values}, source="x.yaml"))

    beside, within = {"guidance_scale": 5}, {"first_pass": {"guidance_scale": 5}, "second_pass": {"guidance_scale": 5}}
    assert sha256(**beside) == sha256(**within) != sha256()
    assert sha256(downscale_factor=0.5) != sha256() != sha256(pipeline_type="base")
    assert sha256(pipeline_type="base", downscale_factor=0.5, **within) == sha256(pipeline_type="base")


def test_presets_that_differ_in_weights_alone_are_one_schedule() -> None:
    found = {name: config_sha256(load_pipeline_config(name)) for name in PRESETS}
    for name, sha256 in found.items():
        assert sha256 == found[name.removesuffix("-fp8")]
    schedules = ("ltxv-13b-0.9.8-distilled", "ltxv-13b-0.9.8-dev", "ltxv-2b-0.9.8-distilled", "ltxv-2b-0.9.5")
    assert len({found[name] for name in schedules}) == len(schedules)


def test_a_named_config_replaces_the_checkpoints_own_in_the_recipe_too(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in DEMO.iterdir():
        if part.is_dir():
            (copy / part.name).symlink_to(part)
    (tmp_path / "named.yaml").write_text("timesteps: [1.0, 0.7]\n")
    shutil.copy(DEMO / "pipeline_config.yaml", copy)
    own, named = (
        recipe(checkpoint=str(copy)),
        recipe(checkpoint=str(copy), pipeline_config=str(tmp_path / "named.yaml")),
    )
    assert "pipeline_config.yaml" not in named["checkpoint"]["files"] and "pipeline_config" in named
    (copy / "pipeline_config.yaml").write_text("timesteps: [1.0]\n")
    assert recipe(checkpoint=str(copy)) != own
    assert recipe(checkpoint=str(copy), pipeline_config=str(tmp_path / "named.yaml")) == named
