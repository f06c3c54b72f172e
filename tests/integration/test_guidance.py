"""Guidance against a plain transcription of the official arithmetic, and spatio-temporal guidance row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel

from ltx_batch.model.guidance import guided_velocity
from ltx_batch.model.latents import token_coords
from ltx_batch.model.perturb import perturbed
from ltx_batch.model.plan import Guidance
from ltx_batch.model.text import Text
from tests.tiny_checkpoint import write_tiny_checkpoint

MODES = ("attention_values", "attention_skip", "residual", "transformer_block")
STEPS = {
    "plain": Guidance(),
    "cfg": Guidance(3.5),
    "cfg star": Guidance(3.5, cfg_star_rescale=True),
    "stg": Guidance(1.0, 1.5, 1.0, skip_blocks=(1,)),
    "stg, rescaled": Guidance(1.0, 1.5, 0.7, skip_blocks=(1,)),
    "all": Guidance(6.0, 4.0, 0.5, cfg_star_rescale=True, skip_blocks=(0, 1)),
}


def text(rows: int, seed: int) -> Text:
    embeds = torch.randn(rows, 4, 16, generator=torch.Generator().manual_seed(seed))
    return Text(embeds, torch.ones(rows, 4, dtype=torch.bool))


def official_blend(negative: Any, positive: Any, disturbed: Any, step: Guidance) -> torch.Tensor:
    """One row in float64; pipeline_ltx_video.py, __call__, "perform guidance"."""
    negative, positive, disturbed = (t.double() for t in (negative, positive, disturbed))
    found = positive
    if step.guidance_scale > 1:
        if step.cfg_star_rescale:
            negative = negative * (positive * negative).sum() / ((negative**2).sum() + 1e-8)
        found = negative + step.guidance_scale * (positive - negative)
    if step.stg_scale > 0:
        found = found + step.stg_scale * (positive - disturbed)
        if step.rescaling_scale != 1:
            factor = positive.std() / found.std()
            found = found * (step.rescaling_scale * factor + (1 - step.rescaling_scale))
    return found


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", STEPS)
def test_answers_are_blended_as_officially_each_row_by_itself(name: str, rows: int) -> None:
    step, asked = STEPS[name], []
    generator = torch.Generator().manual_seed(0)
    answers = {kind: torch.randn(rows, 6, 8, generator=generator) for kind in ("negative", "positive", "disturbed")}

    def predict(tokens: torch.Tensor, words: Text) -> torch.Tensor:
        kinds = ["negative"] * step.negative + ["positive"] + ["disturbed"] * step.perturbed
        assert len(tokens) == len(words.embeds) == rows * len(kinds) == rows * step.rows
        return torch.cat([answers[kind] for kind in kinds])

    @contextmanager
    def perturb(blocks: tuple[int, ...], count: int) -> Iterator[None]:
        asked.append((blocks, count))
        yield

    found = guided_velocity(predict, perturb, torch.zeros(rows, 6, 8), text(rows, 1), text(rows, 2), step)

    for row in range(rows):
        expected = official_blend(*(answers[kind][row] for kind in ("negative", "positive", "disturbed")), step)
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)
    assert asked == ([(step.skip_blocks, rows)] if step.perturbed else [])


def test_guidance_without_a_negative_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance_scale 3\.5 needs a negative prompt"):
        guided_velocity(lambda *_: torch.zeros(0), perturb_none, torch.zeros(1, 1, 1), text(1, 1), None, Guidance(3.5))


def perturb_none(*_: Any) -> Any:
    raise AssertionError("nothing is to be perturbed")


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> LTXVideoTransformer3DModel:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), transformer={"num_layers": 3})
    model = LTXVideoTransformer3DModel.from_pretrained(folder / "transformer").eval().requires_grad_(False)
    for block in model.transformer_blocks:  # at their start they hardly do anything
        block.scale_shift_table.mul_(4)
    return model


def inputs(rows: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    words = text(rows, 7)
    return {
        "hidden_states": torch.randn(rows, 8, 8, generator=generator),
        "encoder_hidden_states": words.embeds,
        "encoder_attention_mask": words.mask,
        "timestep": torch.full((rows, 1), 700.0),
        "video_coords": token_coords((2, 2, 2), start_frame=0, frame_rate=24.0, device=torch.device("cpu")),
        "return_dict": False,
    }


def masked_forward(model: LTXVideoTransformer3DModel, mode: str, blocks: tuple[int, ...]) -> torch.Tensor:
    """One row through all blocks with the official masks, which are 0 for a disturbed row: transformer3d.py, attention.py."""
    given = inputs(1)
    rotary = model.rope(given["hidden_states"], video_coords=given["video_coords"])
    bias = ((1 - given["encoder_attention_mask"].float()) * -10000.0).unsqueeze(1)
    hidden = model.proj_in(given["hidden_states"])
    temb, embedded = model.time_embed(given["timestep"].flatten(), batch_size=1, hidden_dtype=hidden.dtype)
    temb, embedded = temb.view(1, 1, -1), embedded.view(1, 1, -1)
    words = model.caption_projection(given["encoder_hidden_states"])
    for index, block in enumerate(model.transformer_blocks):
        before = hidden
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table + temb.view(1, 1, 6, -1)).unbind(2)
        normed = block.norm1(hidden) * (1 + scale1) + shift1
        attended = block.attn1(hidden_states=normed, encoder_hidden_states=None, image_rotary_emb=rotary)
        if index in blocks and mode == "attention_values":
            attended = block.attn1.to_out[0](block.attn1.to_v(normed))
        if index in blocks and mode == "attention_skip":
            attended = block.attn1.to_out[0](normed)
        hidden = hidden + attended * gate1
        hidden = hidden + block.attn2(hidden, encoder_hidden_states=words, attention_mask=bias)
        hidden = hidden + block.ff(block.norm2(hidden) * (1 + scale2) + shift2) * gate2
        if index in blocks and mode == "transformer_block":
            hidden = before
    shift, scale = (model.scale_shift_table + embedded[:, :, None]).unbind(2)
    return model.proj_out(model.norm_out(hidden) * (1 + scale) + shift)


@pytest.mark.parametrize("blocks", [(1,), (0, 2)])
@pytest.mark.parametrize("mode", MODES)
def test_each_mode_does_to_a_row_what_the_official_masks_do(
    transformer: LTXVideoTransformer3DModel, mode: str, blocks: tuple[int, ...]
) -> None:
    with perturbed(transformer, mode, blocks, rows=1):
        found = transformer(**inputs(1))[0]
    torch.testing.assert_close(found, masked_forward(transformer, mode, blocks), rtol=1e-5, atol=1e-5)
    change = (found - transformer(**inputs(1))[0]).norm() / found.norm()
    assert change == 0 if mode == "residual" else change > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_only_the_last_rows_of_a_batch_are_perturbed(transformer: LTXVideoTransformer3DModel, mode: str) -> None:
    """The official mask takes every third row instead, so it is right for one clip at a time only."""
    given = inputs(2)
    tripled = {k: torch.cat([v] * 3) if torch.is_tensor(v) and len(v) == 2 else v for k, v in given.items()}
    plain = transformer(**tripled)[0]
    with perturbed(transformer, mode, (1,), rows=2):
        found = transformer(**tripled)[0]
    assert torch.equal(found[:4], plain[:4])
    for row in range(2):
        alone = {k: v[row : row + 1] if torch.is_tensor(v) and len(v) == 2 else v for k, v in given.items()}
        with perturbed(transformer, mode, (1,), rows=1):
            torch.testing.assert_close(found[4 + row], transformer(**alone)[0][0], rtol=1e-5, atol=1e-5)


def test_nothing_is_perturbed_afterwards(transformer: LTXVideoTransformer3DModel) -> None:
    before = transformer(**inputs(1))[0]
    with pytest.raises(RuntimeError, match="midway"), perturbed(transformer, "attention_values", (0,), rows=1):
        raise RuntimeError("midway")
    assert torch.equal(transformer(**inputs(1))[0], before)
