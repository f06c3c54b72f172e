"""Fused blocks on the CPU against diffusers' own: numbers, hooks, LoRA, the prompt's keys and values, compiling."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_ltx import LTXVideoRotaryPosEmbed, LTXVideoTransformerBlock
from lora_files import random_pairs, write_lora

from ltx_batch.lora import LoraCache
from ltx_batch.model.attention import use_kernel
from ltx_batch.model.checkpoint import load_checkpoint
from ltx_batch.model.chunks import in_chunks
from ltx_batch.model.lora import apply_loras, linear_shapes, load_adapter
from ltx_batch.model.perturb import perturbed
from ltx_batch.model.quantize.block import FusedBlock, fuse_blocks
from ltx_batch.model.quantize.policy import precision
from ltx_batch.model.quantize.rope import ONE, HalfRope, whole
from ltx_batch.model.quantize.swap import quantize_model
from ltx_batch.model.quantize.text_rows import TextRows, text_kept
from ltx_batch.request import LoraRef
from tests.tiny_checkpoint import write_tiny_checkpoint

CPU = torch.device("cpu")
WIDE = {"num_attention_heads": 4, "attention_head_dim": 32, "cross_attention_dim": 128, "num_layers": 3}
TOKENS = 12
POLICIES: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "int8": {},
    "int8 without rotation": {"hadamard_group": 0},
    "int8 but for some": {"skip": ("attn1.to_k", "ff.net.2", "transformer_blocks.1.ff", "attn2.to_out.0")},
    "int8 but for others": {"skip": ("attn1.to_out.0", "ff.net.0.proj", "transformer_blocks.2.attn2")},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("wide"), transformer=WIDE)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return load_checkpoint(folder, torch.float32).transformer


def quantised(loaded: Any, options: dict[str, Any] | None) -> Any:
    """A copy with diffusers' own blocks, quantised or, for None, not."""
    model = copy.deepcopy(loaded)
    if options is not None:
        quantize_model(model, precision("int8", "cpu", **options), CPU)
    return model


def pair(loaded: Any, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """The same quantised model with diffusers' blocks and with fused ones, whose tables both have."""
    plain = quantised(loaded, options)
    fused = copy.deepcopy(plain)
    assert fuse_blocks(fused) == 3
    half = HalfRope.of(plain.rope)
    plain.rope.forward = lambda *given, **named: whole(half(*given, **named))
    return plain, fused


@torch.inference_mode()
def call(
    model: Any, *, rows: int = 2, levels: int = 1, seed: int = 0, texts: torch.Tensor | None = None
) -> torch.Tensor:
    """A forward with a mask; `levels` is 1 or one noise level a token."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, TOKENS, 8, generator=draw)
    embeds = torch.randn(rows, 5, 16, generator=draw) if texts is None else texts
    out: torch.Tensor = model(
        hidden_states=hidden.to(model.dtype),
        encoder_hidden_states=embeds.to(model.dtype),
        timestep=1000 * torch.rand(1, levels, generator=draw).expand(rows, -1),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0]])[:rows],
        video_coords=torch.rand(1, 3, TOKENS, generator=draw),
        return_dict=False,
    )[0]
    return out.float()


def distance(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / two.norm())


# numbers


@pytest.mark.parametrize("dim", [24, 32, 128, 256])
def test_half_tables_are_diffusers_tables_to_sixteen_bits(dim: int) -> None:
    rope = LTXVideoRotaryPosEmbed(dim)
    hidden, coords = torch.zeros(1, 7, dim), 100 * torch.rand(1, 3, 7)
    for expected, found in zip(
        rope(hidden, video_coords=coords), whole(HalfRope.of(rope)(hidden, video_coords=coords)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.51 / ONE)
    sizes = {"num_frames": 1, "height": 7, "width": 1, "rope_interpolation_scale": (0.5, 32, 32)}
    found, expected = whole(HalfRope.of(rope)(hidden, **sizes))[0], rope(hidden, **sizes)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.51 / ONE)


@pytest.mark.parametrize("levels", [1, TOKENS])
@pytest.mark.parametrize("policy", POLICIES)
def test_fused_blocks_compute_what_diffusers_blocks_do(loaded: Any, policy: str, levels: int) -> None:
    plain, fused = pair(loaded, POLICIES[policy])
    exact = call(loaded, levels=levels)
    expected, found = call(plain, levels=levels), call(fused, levels=levels)
    # Sums in another order may tip a number to the next step of int8, and no more.
    assert distance(found, expected) < (1e-6 if policy == "fp32" else 2e-4)
    assert distance(found, exact) < (3e-5 if policy == "fp32" else 6e-3)


def test_in_16_bits_they_round_less_than_diffusers_blocks(loaded: Any) -> None:
    plain, fused = pair(copy.deepcopy(loaded).bfloat16())
    exact = call(loaded)
    assert distance(call(fused), exact) < 1.3 * distance(call(plain), exact) < 0.02


def test_state_keeps_its_names(loaded: Any) -> None:
    plain, fused = pair(loaded, {})
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert linear_shapes(plain) == linear_shapes(fused) == linear_shapes(loaded)
    assert all(isinstance(block, FusedBlock) for block in fused.transformer_blocks)


def test_what_shares_a_product_lies_together_wherever_it_goes(loaded: Any) -> None:
    _, fused = pair(loaded, {})
    attention = fused.transformer_blocks[1].attn1

    def together() -> bool:
        pointers = [layer.weight.data_ptr() for layer in (attention.to_q, attention.to_k, attention.to_v)]
        return [pointer - pointers[0] for pointer in pointers] == [0, 128 * 128, 2 * 128 * 128]

    assert together()
    attention.to_k.weight.data = attention.to_k.weight.data.clone()
    assert not together()
    before = call(fused)
    fused._apply(torch.clone)  # as a move would
    assert together() and torch.equal(call(fused), before)


def test_blocks_of_another_kind_stay_diffusers_own(tmp_path: Path) -> None:
    odd = write_tiny_checkpoint(tmp_path, transformer={"norm_elementwise_affine": True})
    model = load_checkpoint(odd, torch.float32).transformer
    assert fuse_blocks(model) == 0
    assert all(isinstance(block, LTXVideoTransformerBlock) for block in model.transformer_blocks)


def test_a_row_of_a_batch_is_the_row_alone(loaded: Any) -> None:
    _, fused = pair(loaded, {})
    draw = torch.Generator().manual_seed(1)
    texts = torch.randn(2, 5, 16, generator=draw)
    both = call(fused, texts=texts)
    assert distance(both[:1], call(fused, texts=texts)[:1]) == 0
    alone = fused(
        hidden_states=torch.randn(2, TOKENS, 8, generator=torch.Generator().manual_seed(0))[:1],
        encoder_hidden_states=texts[:1],
        timestep=torch.full((1, 1), 500.0),
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0]]),
        video_coords=torch.rand(1, 3, TOKENS, generator=draw),
        return_dict=False,
    )[0]
    assert alone.shape == (1, TOKENS, 8)


# hooks and other things that are done to a transformer


@pytest.mark.parametrize("mode", ["attention_values", "attention_skip", "residual", "transformer_block"])
@pytest.mark.parametrize("policy", ["fp32", "int8"])
def test_spatio_temporal_guidance_disturbs_them_as_it_does_diffusers_blocks(
    loaded: Any, policy: str, mode: str
) -> None:
    plain, fused = pair(loaded, POLICIES[policy])
    answers = []
    for model in (plain, fused):
        with perturbed(model, mode, [0, 2], 1):
            answers.append(call(model))
    assert distance(answers[1], answers[0]) < 2e-4
    changed = distance(answers[1][1:], call(fused)[1:])
    assert changed == 0 if mode == "residual" else changed > 1e-3
    assert torch.equal(answers[1][:1], call(fused)[:1]) or distance(answers[1][:1], call(fused)[:1]) < 2e-4


@pytest.mark.parametrize(
    "layers",
    [
        ("attn1.to_q", "attn1.to_out.0"),
        ("attn2.to_q", "attn2.to_k", "attn2.to_out.0"),
        ("ff.net.0.proj", "ff.net.2"),
    ],
)
def test_lora_branches_work_in_them(tmp_path: Path, loaded: Any, layers: tuple[str, ...]) -> None:
    plain, fused = pair(loaded, {})
    names = [f"transformer_blocks.{block}.{layer}" for block in (0, 2) for layer in layers]
    pairs = random_pairs({name: linear_shapes(loaded)[name] for name in names}, size=0.3)
    file = write_lora(tmp_path / "lora.safetensors", pairs)
    adapter = load_adapter(LoraCache().fetch(LoraRef(file, 1.0)))
    before = call(fused)
    with apply_loras(plain, [adapter], CPU) as one, apply_loras(fused, [adapter], CPU) as two:
        assert one.ran == two.ran and one.applied >= 2
        found = call(fused)
        assert distance(found, call(plain)) < 2e-4
        assert distance(found, before) > 0.01
    assert torch.equal(call(fused), before)


def test_attention_goes_by_the_kernel_that_was_chosen(loaded: Any) -> None:
    _, fused = pair(loaded, {})
    expected = call(fused)
    kernel = use_kernel(fused)
    assert torch.equal(call(fused), expected)
    kernel.name = "cudnn"  # which no CPU has
    with pytest.raises(RuntimeError, match=r"No (viable backend|available kernel)"):
        call(fused)


@pytest.mark.parametrize("levels", [1, TOKENS])
def test_the_feed_forward_goes_in_chunks(loaded: Any, levels: int) -> None:
    _, fused = pair(loaded, {})
    expected, seen = call(fused, levels=levels), []
    down = fused.transformer_blocks[1].ff.net[2]
    with in_chunks(fused, 5):
        assert distance(call(fused, levels=levels), expected) < 2e-4
        handle = down.register_forward_hook(lambda layer, inputs, out: seen.append(len(inputs[0])))
        call(fused, levels=levels)
        handle.remove()
    assert seen == [5, 5, 2] * 2  # each row of the batch by itself
    assert torch.equal(call(fused, levels=levels), expected)


# the prompt's keys and values


def projections(model: Any) -> list[int]:
    """Counts of rows whose keys were made, call by call; filled as the model works."""
    seen: list[int] = []
    model.transformer_blocks[1].attn2.to_k.register_forward_hook(lambda layer, inputs, out: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("policy", ["fp32", "int8"])
def test_a_prompt_is_worked_on_once_a_clip(loaded: Any, policy: str) -> None:
    _, fused = pair(loaded, POLICIES[policy])
    draw = torch.Generator().manual_seed(2)
    negative, prompt, other = torch.randn(3, 1, 5, 16, generator=draw)
    batches = [
        torch.cat([negative, prompt, prompt]),  # as with spatio-temporal guidance
        torch.cat([negative, prompt]),
        prompt,
        torch.cat([prompt, other, negative]),
    ]
    expected = [call(fused, rows=len(batch), texts=batch, seed=7) for batch in batches]
    made = projections(fused)
    with text_kept(fused):
        for batch, right in zip(batches, expected, strict=True):
            assert distance(call(fused, rows=len(batch), texts=batch, seed=7), right) < 1e-6
    assert made == [2, 1]
    call(fused, rows=2, texts=batches[1])
    assert made == [2, 1, 2]  # and nothing is kept outside


def masks_and_tokens(model: Any) -> list[tuple[bool, int]]:
    """Of every call of a block, whether attention to the prompt had a mask, and how many tokens it read."""
    seen: list[tuple[bool, int]] = []
    block = model.transformer_blocks[1]
    attend = block._attend_text

    def told(hidden: Any, lines: Any, keys: Any, values: Any, mask: Any, shape: Any) -> Any:
        seen.append((mask is not None, keys.shape[1]))
        return attend(hidden, lines, keys, values, mask, shape)

    block._attend_text = told
    return seen


def test_what_only_pads_a_prompt_is_not_read(loaded: Any) -> None:
    _, fused = pair(loaded, {})
    texts = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(4))
    expected = [call(fused, rows=rows, texts=texts[:rows]) for rows in (1, 2, 1)]
    seen = masks_and_tokens(fused)
    made = projections(fused)
    with text_kept(fused):
        for rows, right in zip((1, 2, 1), expected, strict=True):
            assert distance(call(fused, rows=rows, texts=texts[:rows]), right) < 1e-6
    assert seen == [(False, 3), (True, 5), (False, 3)]  # three tokens, then a row of five beside it
    assert made == [1, 2]  # the first row once more, as it is read further


@pytest.mark.parametrize(
    ("mask", "read"),
    [
        ([[1] * 16], (False, 16)),
        ([[1] * 9 + [0] * 7], (False, 9)),
        ([[1] * 9 + [0] * 7, [1] * 3 + [0] * 13], (True, 16)),
        ([[1] * 5 + [0] * 11, [1] * 3 + [0] * 13], (True, 8)),
        ([[1, 0, 1] + [0] * 13], (True, 8)),  # a hole
        ([[0] * 16], (True, 16)),
        (None, (False, 16)),
    ],
)
def test_how_far_prompts_are_read(mask: list[list[int]] | None, read: tuple[bool, int]) -> None:
    rows = TextRows()
    given = None if mask is None else torch.tensor(mask)
    states = torch.randn(1 if mask is None else len(mask), 16, 4)
    with rows.keep():
        rows.note(states, given)
        keys, _ = rows.of(0, states, lambda found: (found, found))
        left = rows.mask(torch.zeros(len(states), 1, 16))
    masked, tokens = read
    assert torch.equal(keys, states[:, :tokens])
    assert (left is None) != masked and (left is None or left.shape[-1] == tokens)


def test_steady_calls_read_a_multiple_of_64_tokens_with_a_mask(loaded: Any) -> None:
    rows = TextRows()
    states = torch.randn(1, 256, 4)
    lengths = {3: 64, 64: 64, 65: 128, 250: 256}
    with rows.keep(), rows.steady():
        for count, read in lengths.items():
            other = states + count
            rows.note(other, (torch.arange(256) < count)[None])
            keys, _ = rows.of(0, other, lambda found: (found, found))
            assert torch.equal(keys, other[:, :read])
            left = rows.mask(torch.zeros(1, 1, 256))
            assert left is not None and left.shape[-1] == read
    _, fused = pair(loaded, {})
    texts = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(4))
    expected = call(fused, rows=2, texts=texts)
    with text_kept(fused), fused.text_rows.steady():
        assert distance(call(fused, rows=2, texts=texts), expected) < 1e-6


def test_keys_and_values_keep_their_places_from_clip_to_clip(loaded: Any) -> None:
    """A recorded call reads where the clip before it read."""
    _, fused = pair(loaded, {})
    rows = fused.text_rows
    rows.fix()
    texts = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(5))
    expected = [call(fused, rows=1, texts=text[None], seed=1) for text in texts]
    seen = []
    for text, right in zip(texts, expected, strict=True):
        with text_kept(fused), rows.steady():
            assert distance(call(fused, rows=1, texts=text[None], seed=1), right) < 1e-6
            assert rows.complete and rows.read == ((0,), 5)
            seen.append([part.data_ptr() for part in rows.of(1, text[None], lambda _: 1 / 0)])
    assert seen[0] == seen[1]
    rows.release()
    with text_kept(fused):
        rows.note(texts[:1], torch.ones(1, 5))
        assert not rows.complete


def test_nothing_is_kept_from_one_clip_to_the_next(loaded: Any) -> None:
    _, fused = pair(loaded, {})
    texts = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    with text_kept(fused):
        before = call(fused, texts=texts)
    with torch.no_grad():
        fused.transformer_blocks[0].attn2.to_v.weight.mul_(2)  # as a LoRA might
    with text_kept(fused):
        assert distance(call(fused, texts=texts), before) > 1e-3


def test_other_transformers_have_nothing_to_keep(loaded: Any) -> None:
    with text_kept(loaded):
        assert torch.equal(call(loaded), call(loaded))


# compiling


@pytest.mark.parametrize("policy", ["fp32", "int8", "int8 but for some"])
def test_blocks_compile_whole(loaded: Any, policy: str) -> None:
    _, fused = pair(loaded, POLICIES[policy])
    expected = call(fused)
    fused.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with text_kept(fused):
        assert distance(call(fused), expected) < 2e-4
        assert distance(call(fused), expected) < 2e-4
    torch.compiler.reset()
