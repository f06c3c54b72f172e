"""Our loop against diffusers' LTXConditionPipeline: same weights, embeddings and draws in, the same latents out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXConditionPipeline
from diffusers.models.autoencoders import vae as vae_module
from diffusers.pipelines.ltx import pipeline_ltx_condition
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image

from ltx_batch.model.expected import Expected
from ltx_batch.model.latents import from_tokens
from ltx_batch.model.load import load_pipeline
from ltx_batch.model.noise import row_noise
from ltx_batch.model.pipeline import LtxPipeline, Row, Stopwatch
from ltx_batch.model.pipeline_config import PipelineConfig
from ltx_batch.model.plan import plan_request
from ltx_batch.model.preprocess import prepare_media
from ltx_batch.model.quantize.policy import precision
from ltx_batch.model.sources import find_sources
from ltx_batch.request import Condition, RenderRequest
from tests.tiny_checkpoint import LATENT_CHANNELS, write_tiny_checkpoint

CPU = torch.device("cpu")
SIGMAS = (1.0, 0.9937, 0.975, 0.725, 0.4219)
HEIGHT, WIDTH, NUM_FRAMES, FRAME_RATE, SEED = 64, 96, 33, 24.0, 11


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> LtxPipeline:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    expected = Expected(None, find_sources(str(folder))[0])
    return load_pipeline(folder, precision("fp32", "cpu"), CPU, expected=expected, text=folder)


@pytest.fixture(scope="module")
def theirs(ours: LtxPipeline) -> LTXConditionPipeline:
    return LTXConditionPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=ours.vae,
        text_encoder=ours.turns.encoder().model,
        tokenizer=ours.turns.encoder().tokenizer,
        transformer=ours.transformer,
    )


def frames(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, HEIGHT, WIDTH, 3), dtype=np.uint8)


IMAGE, OTHER, VIDEO = frames(1, 0), frames(1, 1), frames(17, 2)
CASES: dict[str, tuple[tuple[Condition, ...], float]] = {
    "text": ((), 1.0),
    "text, guided": ((), 3.5),
    "first frame": ((Condition(IMAGE),), 1.0),
    "first frame, guided": ((Condition(IMAGE),), 3.5),
    "first frame, soft": ((Condition(IMAGE, strength=0.6),), 1.0),
    "first frames": ((Condition(VIDEO),), 1.0),
    "later frame": ((Condition(IMAGE, start_frame=13),), 1.0),
    "later frame, guided": ((Condition(IMAGE, start_frame=13),), 3.5),
    "later frame, soft": ((Condition(IMAGE, start_frame=32, strength=0.4),), 1.0),
    "later frames": ((Condition(VIDEO, start_frame=8),), 1.0),
    "later frames, cut to fit": ((Condition(VIDEO, start_frame=16, strength=0.9),), 1.0),
    "all at once": ((Condition(IMAGE), Condition(VIDEO, 8, 0.8), Condition(OTHER, 30)), 2.0),
}


@pytest.mark.parametrize("case", CASES)
def test_latents_equal_those_of_diffusers(
    case: str, ours: LtxPipeline, theirs: LTXConditionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions, guidance_scale = CASES[case]
    sizes: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES, "frame_rate": FRAME_RATE}
    request = RenderRequest(
        prompt="a red circle", timesteps=SIGMAS, guidance_scale=guidance_scale, conditions=conditions, **sizes
    )
    plan = plan_request(request, PipelineConfig.model_validate({}), ours.scheduler)
    items = tuple(prepare_media(c.media, c.start_frame, c.strength, plan.target) for c in conditions)
    prompt, negative = ours.encode("a red circle"), ours.encode("blurry, and worse")
    drawn: list[tuple[str, torch.Tensor]] = []

    def noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        drawn.append((name, row_noise(SEED)(name, shape)))
        return drawn[-1][1]

    found = ours.run_pass(plan.passes[0], plan, [Row(prompt, negative, items, noise)], Stopwatch(CPU))

    replay = Replay(drawn, plan.passes[0].latent_size)
    monkeypatch.setattr(pipeline_ltx_condition, "randn_tensor", replay)
    monkeypatch.setattr(vae_module, "randn_tensor", replay)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        conditions=[to_diffusers(c) for c in conditions] or None,
        timesteps=[1000 * sigma for sigma in SIGMAS],
        guidance_scale=guidance_scale,
        prompt_embeds=prompt.embeds,
        prompt_attention_mask=prompt.mask,
        negative_prompt_embeds=negative.embeds,
        negative_prompt_attention_mask=negative.mask,
        output_type="latent",
        **sizes,
    ).frames

    assert not replay.left, "diffusers drew less than we did"
    assert found.shape == expected.shape == (1, LATENT_CHANNELS, 5, 2, 3)
    assert (found - expected).norm() / expected.norm() < 1e-4
    start = from_tokens(dict(drawn)["pass1.init"], plan.passes[0].latent_size)
    assert (found - start).norm() / start.norm() > 0.1, "the loop did next to nothing, so equality says nothing"


class Replay:
    """Gives our draws to diffusers, in its order, in its layout; fails where it asks for another shape."""

    def __init__(self, drawn: Sequence[tuple[str, torch.Tensor]], size: tuple[int, int, int]) -> None:
        self.left: list[torch.Tensor] = []
        for name, tensor in drawn:
            self.left.append(from_tokens(tensor, size) if name == "pass1.init" else tensor)

    def __call__(self, shape: Sequence[int], **_: Any) -> torch.Tensor:
        tensor = self.left.pop(0)
        assert tuple(tensor.shape) == tuple(shape)
        return tensor.clone()


def to_diffusers(condition: Condition) -> LTXVideoCondition:
    pictures = [Image.fromarray(frame) for frame in condition.media]
    where: dict[str, Any] = {"frame_index": condition.start_frame, "strength": condition.strength}
    return (
        LTXVideoCondition(image=pictures[0], **where)
        if len(pictures) == 1
        else LTXVideoCondition(video=pictures, **where)
    )


def test_embeddings_equal_those_of_diffusers(ours: LtxPipeline, theirs: LTXConditionPipeline) -> None:
    found = ours.encode("  a red circle \n")
    embeds, mask, _, _ = theirs.encode_prompt("a red circle", do_classifier_free_guidance=False)
    assert torch.equal(found.mask, mask)
    assert mask.sum() == len("a red circle") + 1
    assert torch.equal(found.embeds[mask], embeds[mask])
    assert embeds[~mask].any() and not found.embeds[~mask].any(), "what T5 says of padding is left out"
