"""Blocks that come from host memory one by one: on a CPU, where only the page-locked memory and the streams are missing."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from ltx_batch.model.block_stream import BlockStream
from ltx_batch.model.checkpoint import load_checkpoint
from ltx_batch.model.packed import Packed
from ltx_batch.model.perturb import perturbed
from tests.tiny_checkpoint import CAPTION_CHANNELS, LATENT_CHANNELS, write_tiny_checkpoint

CPU = torch.device("cpu")
BLOCKS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), transformer={"num_layers": BLOCKS})


@pytest.fixture
def transformer(folder: Path) -> Any:
    return load_checkpoint(folder, torch.float32, with_text=False).transformer


@torch.inference_mode()
def forward(transformer: Any, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return transformer(
        hidden_states=torch.randn(2, 12, LATENT_CHANNELS, generator=generator),
        encoder_hidden_states=torch.randn(2, 6, CAPTION_CHANNELS, generator=generator),
        encoder_attention_mask=torch.ones(2, 6, dtype=torch.bool),
        timestep=torch.full((2, 1), 700.0),
        video_coords=torch.rand(1, 3, 12, generator=generator),
        return_dict=False,
    )[0]


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that were copied to the device, in order."""
    seen: list[int] = []
    fetch = BlockStream._fetch

    def spy(self: BlockStream, index: int, *args: Any, **kwargs: Any) -> Any:
        seen.append(index)
        return fetch(self, index, *args, **kwargs)

    monkeypatch.setattr(BlockStream, "_fetch", spy)
    return seen


@pytest.mark.parametrize("kept", range(BLOCKS + 1))
def test_streamed_blocks_compute_the_same_bits(transformer: Any, kept: int) -> None:
    expected = [forward(transformer, seed) for seed in range(3)]
    stream = BlockStream(transformer.transformer_blocks, CPU)
    stream.keep(kept)
    assert all(torch.equal(forward(transformer, seed), answer) for seed, answer in enumerate(expected))
    slots = 0 if kept == BLOCKS else 2
    assert stream.held_bytes == (kept + slots) * stream._packs[0].size_bytes
    stream.leave()
    assert stream.held_bytes == 0


def test_each_block_comes_once_a_forward_and_ahead_of_its_turn(transformer: Any, fetched: list[int]) -> None:
    stream = BlockStream(transformer.transformer_blocks, CPU)
    stream.keep(0)
    forward(transformer)
    forward(transformer)
    assert fetched == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0], "the last forward fetches for the next one"
    fetched.clear()
    stream.keep(2)
    assert not fetched, "blocks that stay are not waited for"
    forward(transformer)
    assert fetched == [0, 1, 2, 3, 4, 0], "they come in their turn"
    fetched.clear()
    forward(transformer)
    assert fetched == [1, 3, 0], "and only once; they are spread over the others"
    fetched.clear()
    stream.keep(BLOCKS)
    forward(transformer)
    forward(transformer)
    assert fetched == [0, 1, 3]


def test_a_forward_that_broke_off_is_begun_again(transformer: Any) -> None:
    expected = forward(transformer)
    stream = BlockStream(transformer.transformer_blocks, CPU)
    for broken in range(BLOCKS):
        stream.leave()
        stream.keep(2)
        block = transformer.transformer_blocks[broken].ff
        hook = block.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            forward(transformer)
        hook.remove()
        assert torch.equal(forward(transformer), expected)


def test_what_stays_changes_between_forwards(transformer: Any) -> None:
    expected = forward(transformer)
    stream = BlockStream(transformer.transformer_blocks, CPU)
    for kept in (0, 3, 5, 1, 0, 5):
        stream.keep(kept)
        assert torch.equal(forward(transformer), expected)
        stream.keep(BLOCKS - kept)
        stream.leave(kept // 2)
        assert torch.equal(forward(transformer), expected)
        assert stream.held_bytes == sum(
            pack.size_bytes for index, pack in enumerate(stream._packs) if index in stream._staying
        )


@pytest.mark.parametrize("mode", ["attention_values", "attention_skip", "transformer_block"])
def test_perturbed_blocks_are_streamed_too(transformer: Any, mode: str) -> None:
    with perturbed(transformer, mode, (0, 3), 1):
        expected = forward(transformer)
    assert not torch.equal(expected, forward(transformer))
    BlockStream(transformer.transformer_blocks, CPU).keep(1)
    with perturbed(transformer, mode, (0, 3), 1):
        assert torch.equal(forward(transformer), expected)


def test_weights_that_change_in_host_memory_come_changed(transformer: Any) -> None:
    stream = BlockStream(transformer.transformer_blocks, CPU)
    stream.keep(2)
    before = forward(transformer)
    stream.leave()
    with torch.no_grad():
        for block in transformer.transformer_blocks:
            block.ff.net[2].weight.mul_(2)
    stream.keep(2)
    doubled = forward(transformer)
    assert not torch.equal(before, doubled)
    stream.leave()
    for block in transformer.transformer_blocks:
        block.attn1.to_q.register_buffer("lora_down", torch.ones(3))
    stream.repack()
    stream.keep(1)
    assert torch.equal(forward(transformer), doubled)
    assert all(torch.equal(block.attn1.to_q.lora_down, torch.ones(3)) for block in transformer.transformer_blocks)


def test_blocks_are_packed_anew_one_by_one(transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a change of LoRA files would want the blocks twice in host memory."""
    stream = BlockStream(transformer.transformer_blocks, CPU)
    held = [weakref.ref(pack.host.untyped_storage()) for pack in stream._packs]
    counts: list[int] = []
    pack = BlockStream._pack

    def spy(self: BlockStream, block: nn.Module) -> Packed:
        packed = pack(self, block)
        held.append(weakref.ref(packed.host.untyped_storage()))
        counts.append(sum(storage() is not None for storage in held))
        return packed

    monkeypatch.setattr(BlockStream, "_pack", spy)
    stream.repack()
    assert counts == [BLOCKS + 1] * BLOCKS


def test_a_stream_that_let_go_leaves_no_trace(transformer: Any) -> None:
    expected = forward(transformer)
    stream = BlockStream(transformer.transformer_blocks, CPU)
    stream.keep(BLOCKS)
    stream.detach()
    seen = weakref.ref(stream)
    del stream
    assert seen() is None
    assert torch.equal(forward(transformer), expected)


# what can be packed


class Odd(nn.Module):
    """A tensor of every kind that a layer may hold."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3))
        self.register_buffer("transposed", torch.randint(-9, 9, (4, 6), dtype=torch.int8).t())
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("strided", torch.arange(12.0)[::3])
        self.tied = self.weight


def test_any_tensor_can_be_packed() -> None:
    module = Odd()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pack = Packed(module, CPU)
    copy = pack.host.clone()
    pack.host.zero_()
    pack.point_at(copy)
    after = module.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert module.tied is module.weight and module.weight.data_ptr() == copy.data_ptr()
    assert module.transposed.stride() == (1, 6), "the layout that a kernel was given"
    assert pack.size_bytes < 5 * 256 + 1


@pytest.mark.parametrize("forwards_before", [0, 1])
def test_bitsandbytes_layers_take_their_scales_along(forwards_before: int) -> None:
    torch.manual_seed(0)
    layers = [bitsandbytes.nn.Linear8bitLt(32, 32, has_fp16_weights=False).to(CPU) for _ in range(3)]
    chain = nn.Sequential(*(nn.Sequential(layer) for layer in layers)).eval()
    values = torch.randn(4, 32)
    with torch.inference_mode():
        plain = copy.deepcopy(chain)(values)
        for _ in range(forwards_before):
            chain(values)
        BlockStream(list(chain), CPU).keep(0)
        assert torch.equal(chain(values), plain)
        assert torch.equal(chain(values), plain)
    for layer in layers:
        assert layer.weight.data_ptr() == layer.state.CB.data_ptr(), "one copy of a weight"
