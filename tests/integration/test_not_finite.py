"""Numbers that overflow under quantisation: the attempt fails, and the next one renders without it, marked degraded."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from job_runs import check_output, ledger_of, make_job, read_records, write_manifest

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.driver import run
from ltx_batch.errors import NotFinite
from ltx_batch.model import pipeline
from ltx_batch.model.block_stream import BlockStream
from tests.tiny_checkpoint import write_tiny_checkpoint

CONFIG = "timesteps: [1.0, 0.7]\nguidance_scale: 1\n"
REQUEST = RenderRequest(prompt="a red circle", height=32, width=32, num_frames=9, seed=7)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), pipeline_config=CONFIG)


@pytest.fixture
def overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantised models have an infinity in their last layer: on a CPU no product overflows by itself."""
    apply_policy = pipeline.apply_policy

    def spoil(transformer: Any, vae: Any, policy: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = apply_policy(transformer, vae, policy, *args, **kwargs)
        if policy.quantize is not None:
            transformer.proj_out.bias.fill_(torch.inf)
        return found

    monkeypatch.setattr(pipeline, "apply_policy", spoil)


@pytest.mark.parametrize("precision", ["bnb-int8", "int8"])
@pytest.mark.usefixtures("overflow")
def test_an_overflow_is_rendered_without_quantisation(tiny: Path, precision: str) -> None:
    plain = load_renderer(str(tiny), device="cpu").render([REQUEST])[0]
    quantised = load_renderer(str(tiny), device="cpu", precision=precision)
    for _ in range(2):
        with pytest.raises(NotFinite, match="not finite after pass1; another attempt renders it without quantisation"):
            quantised.render([REQUEST])
        clip = quantised.render([REQUEST], unquantised=True)[0]
        assert clip.frames_sha256() == plain.frames_sha256()
        assert clip.ran["degraded"] is True and clip.ran["unquantised"] is True
        assert clip.ran["precision"] == precision, "what the row was asked to be"
    assert quantised._pipeline.lodging._stand_in is None and not plain.ran["degraded"]


@pytest.mark.parametrize("precision", ["bnb-int8", "int8"])
@pytest.mark.parametrize("rendered_before", [True, False])
def test_a_stand_in_is_gone_after_its_row_and_all_parts_are_back(
    tiny: Path, precision: str, rendered_before: bool
) -> None:
    renderer = load_renderer(str(tiny), device="cpu", precision=precision)
    pipeline = renderer._pipeline
    expected = load_renderer(str(tiny), device="cpu", precision=precision).render([REQUEST])[0]
    if rendered_before:
        renderer.render([REQUEST])
    mode, hooks, held_bytes = pipeline.lodging.mode, _hooks(pipeline.transformer), pipeline.lodging.held_bytes
    seen, load = [], pipeline._load_unquantised
    assert load is not None

    def watched() -> Any:
        stand_in = load()
        seen.extend(weakref.ref(module) for module in (stand_in, *stand_in.transformer_blocks))
        return stand_in

    pipeline._load_unquantised = watched
    gc.collect()
    gc.disable()
    try:
        renderer.render([REQUEST], unquantised=True)
        assert len(seen) == 3 and not any(module() for module in seen), "it waits for no search for cycles"
    finally:
        gc.enable()
    assert pipeline.lodging.mode == mode and _hooks(pipeline.transformer) == hooks
    assert pipeline.lodging.held_bytes == held_bytes
    clip = renderer.render([REQUEST])[0]
    assert clip.ran["placement"]["mode"] == "resident"
    assert clip.frames_sha256() == expected.frames_sha256()


def test_where_memory_has_gone_parts_go_on_coming_for_their_stages(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = load_renderer(str(tiny), device="cpu", precision="int8")
    expected = renderer.render([REQUEST])[0]
    keep = BlockStream.keep

    def full(self: BlockStream, count: int) -> None:
        if count:
            raise torch.OutOfMemoryError("scripted: no block can stay")
        keep(self, count)

    monkeypatch.setattr(BlockStream, "keep", full)
    renderer.render([REQUEST], unquantised=True)
    monkeypatch.undo()
    assert renderer._pipeline.lodging.mode == "offload" and renderer._pipeline.lodging.held_bytes == 0
    clip = renderer.render([REQUEST])[0]
    assert clip.ran["placement"]["mode"] == "offload"
    assert clip.frames_sha256() == expected.frames_sha256()


def _hooks(module: torch.nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in module.modules())


def test_without_quantisation_there_is_nothing_else_to_try(tiny: Path) -> None:
    renderer = load_renderer(str(tiny), device="cpu")
    renderer._pipeline.transformer.proj_out.bias.fill_(torch.inf)
    with pytest.raises(NotFinite, match="not finite after pass1; are the weights whole"):
        renderer.render([REQUEST])
    with pytest.raises(NotFinite, match="no other precision to render in"):
        renderer.render([REQUEST], unquantised=True)


@pytest.mark.usefixtures("overflow")
def test_a_run_ends_well_and_tells_both_attempts(tiny: Path, tmp_path: Path) -> None:
    job = make_job(
        write_manifest(tmp_path, ["a red circle", "a blue square"]),
        tmp_path / "out",
        model={"renderer": "ltx", "checkpoint": str(tiny), "precision": "bnb-int8"},
        workers=0,
    )
    summary = run(job)
    assert (summary.exit_code, summary.ok) == (0, 2)
    check_output(job, summary.run)
    ledger = ledger_of(job)
    for record in read_records(job).values():
        assert (record.attempts, record.degraded, record.ran["unquantised"]) == (2, True, True)
        told = ledger.read_attempt(summary.run, record.key, 1)
        assert told["cause"] == "NotFinite" and "without quantisation" in told["error"]
        assert json.loads(record.to_json())["ran"]["placement"]["mode"] == "offload"
