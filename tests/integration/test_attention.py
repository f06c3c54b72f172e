"""Self-attention by a kernel of choice, and passes in chunks of tokens, on a transformer of diffusers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import LTXVideoTransformer3DModel
from job_runs import make_job, write_manifest
from torch import nn

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.driver import run
from ltx_batch.errors import JobError
from ltx_batch.model import attention
from ltx_batch.model.attention import Kernel, SelfAttention, attend, fastest, use_kernel
from ltx_batch.model.block_stream import BlockStream
from ltx_batch.model.chunks import in_chunks
from ltx_batch.model.perturb import perturbed
from ltx_batch.model.sharding import _Carried, deal_out, device_map
from tests.tiny_checkpoint import CAPTION_CHANNELS, LATENT_CHANNELS, TRANSFORMER, write_tiny_checkpoint

CPU = torch.device("cpu")
TOKENS = 23


@pytest.fixture
def transformer() -> Any:
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(**{**TRANSFORMER, "num_layers": 4}).eval()


@torch.inference_mode()
def forward(transformer: Any, *, levels: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return transformer(
        hidden_states=torch.randn(2, TOKENS, LATENT_CHANNELS, generator=generator),
        encoder_hidden_states=torch.randn(2, 6, CAPTION_CHANNELS, generator=generator),
        encoder_attention_mask=torch.arange(6).expand(2, 6) < 4,
        timestep=torch.rand(1, TOKENS if levels else 1, generator=generator).mul(1000).expand(2, -1),
        video_coords=torch.rand(1, 3, TOKENS, generator=generator) * 100,
        return_dict=False,
    )[0]


# kernels


def test_the_native_kernel_computes_what_diffusers_does(transformer: Any) -> None:
    expected = forward(transformer)
    kernel = use_kernel(transformer)
    assert all(block.attn1.processor.kernel is kernel for block in transformer.transformer_blocks)
    assert torch.equal(forward(transformer), expected)
    with perturbed(transformer, "attention_values", (1, 2), 1):
        disturbed = forward(transformer)
    assert torch.equal(disturbed[0], expected[0]) and not torch.equal(disturbed[1], expected[1])


def test_a_processor_of_another_kind_stays(transformer: Any) -> None:
    mine = SelfAttention(Kernel())
    transformer.transformer_blocks[2].attn1.set_processor(mine)
    kernel = use_kernel(transformer)
    found = [block.attn1.processor for block in transformer.transformer_blocks]
    assert found[2] is mine and [one.kernel is kernel for one in found] == [True, True, False, True]


@pytest.mark.parametrize("name", ["native", "flash"])
def test_kernels_agree(name: str) -> None:
    query, key, value = (torch.randn(2, 3, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    expected = (query @ key.mT / 4).softmax(-1) @ value
    assert torch.allclose(attend(name, query, key, value), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("timed_ms", "name"),
    [
        ({"native": 1.0}, "native"),
        ({"native": 1.0, "cudnn": 0.97, "flash": 2.0}, "native"),
        ({"native": 1.0, "cudnn": 0.9, "flash": 0.8}, "flash"),
        ({"native": 1.0, "cudnn": float("inf"), "flash": 0.5}, "flash"),
        ({"native": float("inf"), "cudnn": 1.0}, "cudnn"),
    ],
)
def test_another_kernel_must_be_clearly_faster(timed_ms: dict[str, float], name: str) -> None:
    assert fastest(timed_ms) == name


def test_a_cpu_times_nothing() -> None:
    kernel = Kernel()
    kernel.choose((1, 2, TOKENS, 16), torch.bfloat16, CPU)
    assert (kernel.name, kernel.timed_ms) == ("native", {})


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package by the name of SageAttention, which is too fast to be beaten."""
    (tmp_path / "sageattention.py").write_text(
        "def sageattn(query, key, value, tensor_layout, is_causal):\n    return value.clone()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    attention._sage.cache_clear()
    yield
    attention._sage.cache_clear()
    sys.modules.pop("sageattention", None)


def test_sage_is_never_taken_unasked(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(
        attention, "_time_ms", lambda name, *_: (timed.append(name), 1.0 if name == "native" else 0.5)[1]
    )
    kernel = Kernel()
    kernel.choose((1, 2, TOKENS, 16), torch.bfloat16, torch.device("cuda"))
    assert timed == ["native", "cudnn", "flash", "efficient"]
    assert kernel.name in timed[1:]


@pytest.mark.parametrize("asked", ["native", "sage"])
def test_a_kernel_that_is_asked_for_is_taken_without_a_stopwatch(
    installed: None, monkeypatch: pytest.MonkeyPatch, transformer: Any, asked: str
) -> None:
    monkeypatch.setattr(attention, "_time_ms", lambda *_: pytest.fail("nothing is timed"))
    plain = forward(transformer)
    kernel = use_kernel(transformer, asked)
    kernel.choose((1, 2, TOKENS, 16), torch.bfloat16, torch.device("cuda"))
    assert kernel.name == asked
    assert torch.equal(forward(transformer), plain) is (asked == "native")


def test_what_ran_is_told_of_every_pass() -> None:
    kernel = Kernel()
    for name in ("flash", "native", "flash"):
        kernel.timed_ms[1, 2, TOKENS, 16] = {"native": 1.0, "flash": 0.5 if name == "flash" else 2.0}
        kernel.choose((1, 2, TOKENS, 16), torch.bfloat16, torch.device("cuda"))
    assert (kernel.taken(), kernel.taken()) == ("flash, native", "")


def test_a_kernel_is_chosen_for_one_clip_whatever_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    choose = Kernel.choose
    monkeypatch.setattr(Kernel, "choose", lambda kernel, *given: (seen.append(given[0]), choose(kernel, *given))[1])
    tiny = write_tiny_checkpoint(tmp_path, pipeline_config="timesteps: [1.0]\nguidance_scale: 2\n")
    renderer = load_renderer(str(tiny), device="cpu")
    requests = [RenderRequest(prompt="a", height=64, width=32, num_frames=9, seed=seed) for seed in (1, 2, 3)]
    (alone,) = renderer.render(requests[:1])
    together = renderer.render(requests)
    assert seen == [(2, 2, 4, 16)] * 2, "rows of guidance, heads, tokens, channels"
    assert [clip.ran["attention"] for clip in (alone, *together)] == ["native"] * 4


def test_sage_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(**model: Any) -> Any:
        model = {"renderer": "ltx", "checkpoint": "demo", "attention": "sage", "device": "auto", **model}
        return make_job(write_manifest(tmp_path, ["a"]), tmp_path / "out", model=model)

    with pytest.raises(JobError, match="SageAttention is not installed: pip install sageattention"):
        run(job())
    with pytest.raises(JobError, match="does not run on a CPU"):
        run(job(device="cpu"))
    with pytest.raises(JobError, match="does not run in fp32"):
        run(job(precision="fp32"))
    with pytest.raises(JobError, match="does not run on a CPU"):
        load_renderer("demo", device="cpu", attention="sage")
    with pytest.raises(JobError, match="unknown attention 'fast'"):
        load_renderer("demo", device="cpu", attention="fast")
    assert not (tmp_path / "out").exists()


# chunks


@pytest.mark.parametrize("chunk_tokens", [1, 5, 23, 100])
@pytest.mark.parametrize("levels", [False, True])
def test_chunks_change_nothing_but_rounding(transformer: Any, chunk_tokens: int, levels: bool) -> None:
    use_kernel(transformer)
    expected = forward(transformer, levels=levels)
    with in_chunks(transformer, chunk_tokens):
        found = forward(transformer, levels=levels)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(forward(transformer, levels=levels), expected), "and nothing of it stays"


def test_chunks_are_what_the_layers_see(transformer: Any) -> None:
    use_kernel(transformer)
    seen: list[int] = []
    transformer.transformer_blocks[1].ff.net[2].register_forward_hook(
        lambda _, args, out: seen.append(args[0].shape[1])
    )
    with in_chunks(transformer, 10), pytest.raises(RuntimeError, match="stop"):
        forward(transformer)
        raise RuntimeError("stop")
    assert seen == [10, 10, 3]
    assert "forward" not in vars(transformer.rope) and "forward" not in vars(transformer.transformer_blocks[0].ff)


def test_blocks_of_another_kind_are_told(transformer: Any) -> None:
    class Fused(nn.Module):
        chunk_tokens: int | None = None

        def __init__(self, block: Any) -> None:
            super().__init__()
            self.ff = block.ff

    blocks = [Fused(block) for block in transformer.transformer_blocks]
    transformer.transformer_blocks = nn.ModuleList(blocks)
    with in_chunks(transformer, 7):
        assert [block.chunk_tokens for block in blocks] == [7] * 4
        assert "forward" not in vars(transformer.rope)
    assert [block.chunk_tokens for block in blocks] == [None] * 4


def test_tables_of_a_chunk_lie_where_its_block_does(transformer: Any) -> None:
    """accelerate's hook of a dealt transformer brings what the rotary module gives to the first device, here to none."""
    use_kernel(transformer)
    expected = forward(transformer)
    add_hook_to_module(transformer.rope, AlignDevicesHook(execution_device="meta"))
    hooked = transformer.rope.forward
    with in_chunks(transformer, 10):
        found = forward(transformer)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert transformer.rope.forward is hooked


# shards


def test_blocks_lie_in_order_and_the_rest_on_the_first_device() -> None:
    found = device_map(["proj_in", "transformer_blocks", "proj_out"], [1, 0, 3])
    assert found == {"proj_in": 0, "proj_out": 0} | {f"transformer_blocks.{i}": n for i, n in enumerate([0, 2, 2, 2])}


def test_a_dealt_transformer_computes_the_same_bits(transformer: Any) -> None:
    """All shards on one device: accelerate's hooks and ours at work, with nothing to move."""
    with perturbed(transformer, "transformer_block", (0, 3), 1):
        disturbed = forward(transformer)
    expected = forward(transformer)
    undo = deal_out(transformer, [1, 3], [CPU, CPU])
    assert torch.equal(forward(transformer), expected)
    with perturbed(transformer, "transformer_block", (0, 3), 1):
        assert torch.equal(forward(transformer), disturbed)
    undo()
    assert not any(hasattr(layer, "_hf_hook") or layer._forward_pre_hooks for layer in transformer.modules())
    BlockStream(transformer.transformer_blocks, CPU).keep(1)
    assert torch.equal(forward(transformer), expected), "and it can live otherwise"


def test_what_all_blocks_are_given_is_carried_once_a_device() -> None:
    carried, far = _Carried(), torch.device("meta")
    tables, hidden = (torch.ones(2), torch.ones(3)), torch.ones(4)
    given = {"hidden_states": hidden, "image_rotary_emb": tables, "encoder_attention_mask": None}
    hook = carried.bring_to(far)
    (_, first), (_, second) = (hook(nn.Identity(), (), given) for _ in range(2))
    assert first["image_rotary_emb"][0] is second["image_rotary_emb"][0]
    assert first["image_rotary_emb"][0].device == far == first["hidden_states"].device
    assert first["encoder_attention_mask"] is None
    carried.forget()
    _, third = hook(nn.Identity(), (), given)
    assert third["image_rotary_emb"][0] is not first["image_rotary_emb"][0]
