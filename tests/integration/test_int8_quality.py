"""The outlier twin of the demo, and what int8 does to the numbers of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.clip_scores import Score, open_crew, score_clips
from benchmarks.demo_checkpoint.evaluate import ATTRIBUTES, held_out_cases
from benchmarks.int8_errors import predict, predictor, recorded, relative
from benchmarks.int8_kinds import KINDS, Kind, Results
from benchmarks.int8_quality import Judged, tell
from benchmarks.outlier_twin import FACTOR, write_twin
from ltx_batch import RenderRequest, load_renderer

CPU = torch.device("cpu")
REQUEST = RenderRequest(prompt="a red circle moves right over a dark background", height=64, width=64, num_frames=9)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("made") / "twin")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_twin_renders_the_demos_frames_to_the_last_bit(twin: Path, precision: str) -> None:
    demo, other = (
        load_renderer(place, device="cpu", precision=precision).render([REQUEST])[0] for place in ("demo", str(twin))
    )
    assert demo.frames_sha256() == other.frames_sha256()


def test_a_second_twin_is_the_same(twin: Path, tmp_path: Path) -> None:
    files = [
        place / "transformer" / "diffusion_pytorch_model.safetensors" for place in (twin, write_twin(tmp_path / "t"))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_rotation_at_least_halves_the_error_that_the_twins_outliers_make(twin: Path) -> None:
    calls = recorded(held_out_cases(2), CPU)[::3]
    errors = {}
    for kind in KINDS:
        if kind.name in ("int8", "int8-hadamard-0", "bnb-int8"):
            model = predictor(twin, kind, CPU)
            found = [relative(predict(model, inputs), exact, rows=True) for inputs, exact in calls]
            errors[kind.name] = float(torch.stack(found).median())
    assert errors["int8-hadamard-0"] > 2 * errors["int8"] > 0.01
    assert errors["bnb-int8"] > 2 * errors["int8"]


def test_the_twin_has_what_its_name_says(twin: Path) -> None:
    largest: dict[str, float] = {}
    for name, place in (("demo", "demo"), ("twin", str(twin))):
        renderer = load_renderer(place, device="cpu", precision="fp32")
        layer = renderer._pipeline.transformer.transformer_blocks[2].attn1.to_out[0]
        layer.register_forward_pre_hook(
            lambda _, args, name=name: largest.update({name: max(largest.get(name, 0.0), float(args[0].abs().max()))})
        )
        renderer.render([REQUEST])
    assert largest["twin"] > FACTOR / 8 * largest["demo"]


# how clips are judged


def judged(rights: list[list[bool]], lpips: list[float]) -> Judged:
    scores = [Score(40.0, 0.99, tuple(right)) for right in rights]
    return Judged(np.zeros((len(rights), 1, 1, 1, 3), np.uint8), scores, np.array(lpips))


def test_adherence_is_paired_and_tells_the_attribute_that_changed_most(tmp_path: Path) -> None:
    yes = [True] * len(ATTRIBUTES)
    no = [name != "shape" for name in ATTRIBUTES]
    results = Results(tmp_path / "r.json", CPU)
    tell(results, "demo_int8", judged([yes, no, no, yes], [0.1, 0.2, 0.3, 0.6]), judged([yes, yes, yes, no], [0.0] * 4))
    found = results.figures["demo_int8_adherence"]
    assert (found["value"], found["lost"], found["won"], found["all_right"]) == (-25.0, 2, 1, -25.0)
    assert found["by_attribute"]["colour"] == 0
    lpips = results.figures["demo_int8_lpips"]
    assert (lpips["value"], lpips["median"], lpips["worst"], lpips["clips"]) == (0.3, 0.25, 0.6, 4)


def test_clips_are_scored_by_the_projects_metrics_and_the_demos_reader() -> None:
    cases = held_out_cases(1)
    clips = np.random.default_rng(0).integers(0, 255, (1, 2, 64, 64, 3), np.uint8)
    with open_crew(0) as crew:
        found: Any = crew.submit(score_clips, clips, [cases[0].expected], clips).result()[0]
    assert (found.psnr, found.ssim) == (60.0, pytest.approx(1.0))
    assert len(found.right) == len(ATTRIBUTES) and not all(found.right)


def test_a_kind_bends_the_policy_as_a_job_would() -> None:
    assert Kind("x", "bnb-int8", {"llm_int8_threshold": 6.0}).policy(CPU).threshold == 6.0
    assert KINDS[0].policy(CPU) == Kind("int8", "int8").policy(CPU)
