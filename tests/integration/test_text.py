"""Text by every way: encoded beside the transformer, in a phase of its own, or not at all; the frames are the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from job_runs import check_output, ledger_of, make_job, read_records, write_manifest
from safetensors.torch import load_file
from servers import S3Server

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.clip import Clip
from ltx_batch.driver import RunOptions, encode, run
from ltx_batch.errors import CheckpointError, EmbeddingMissing, JobError
from ltx_batch.job import JobSpec
from ltx_batch.model.checkpoint import TextParts
from ltx_batch.model.graphs import StepGraphs
from ltx_batch.model.noise import row_noise
from ltx_batch.model.pipeline import Row, Stopwatch
from ltx_batch.model.text import Text, TextEncoder
from ltx_batch.model.text_cache import TextCache
from ltx_batch.model.text_key import TextIdentity
from ltx_batch.model.text_source import TextSource
from ltx_batch.pool import LocalPool
from ltx_batch.renderer import LtxRenderer
from ltx_batch.storage import Storage
from tests.tiny_checkpoint import CAPTION_CHANNELS, write_tiny_checkpoint

CPU = torch.device("cpu")
CONFIG = "timesteps: [1.0, 0.7]\nguidance_scale: 2\n"
PROMPTS = ["a red circle", "a blue square", "a red circle", "  a blue square "]
REQUEST = RenderRequest(prompt="a red circle", height=32, width=32, num_frames=9, seed=7)
IDENTITY = TextIdentity("e" * 64, "float32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), pipeline_config=CONFIG)


@pytest.fixture(scope="module")
def encoder(tiny: Path) -> TextEncoder:
    return TextEncoder.load(TextParts.find(tiny, "float32"), CPU)


def one(renderer: LtxRenderer, **changes: Any) -> Clip:
    return renderer.render([replace(REQUEST, **changes)])[0]


# what is behind the last token


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_what_t5_says_of_padding_changes_no_bit(tiny: Path, name: str) -> None:
    """So it need not be stored. The mask takes it out: a weight of exp(-10000) is zero in every precision."""
    renderer = load_renderer(str(tiny), device="cpu", precision=name)
    pipeline, plan = renderer._pipeline, renderer.plan(REQUEST)
    assert pipeline.turns is not None
    raw = [_with_padding(pipeline.turns.encoder(), text) for text in ("a red circle", "worst quality")]
    plain = [pipeline.encode(text) for text in ("a red circle", "worst quality")]
    for padded, zeroed in zip(raw, plain, strict=True):
        assert torch.equal(padded.mask, zeroed.mask) and not torch.equal(padded.embeds, zeroed.embeds)
    latents = [
        pipeline.run_pass(plan.passes[0], plan, [Row(prompt, negative, (), row_noise(7))], Stopwatch(CPU))
        for prompt, negative in (raw, plain, [Text(text.embeds, torch.ones_like(text.mask)) for text in raw])
    ]
    assert torch.equal(latents[0], latents[1])
    assert not torch.equal(latents[0], latents[2]), "without its mask the padding does count"


@torch.inference_mode()
def _with_padding(encoder: TextEncoder, text: str) -> Text:
    found = encoder.tokenizer([text], padding="max_length", max_length=256, return_tensors="pt")
    embeds = encoder.model(input_ids=found.input_ids, attention_mask=found.attention_mask)[0]
    return Text(embeds, found.attention_mask.bool())


# the cache


@pytest.fixture
def cache(tmp_path: Path) -> TextCache:
    return TextCache(Storage(str(tmp_path / "text")), IDENTITY)


def only_file(folder: Path) -> Path:
    (file,) = folder.rglob("*.safetensors")
    return file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 12, 256])
def test_embeddings_come_back_bit_by_bit(cache: TextCache, tmp_path: Path, dtype: torch.dtype, count: int) -> None:
    tokens = torch.randn(count, CAPTION_CHANNELS).to(dtype)
    assert cache.put("a red circle", tokens) is tokens
    found = cache.get(" a red circle ")
    assert found is not None and found.dtype == dtype and torch.equal(found, tokens)
    text = Text.of_tokens(found)
    assert text.embeds.shape == (1, 256, CAPTION_CHANNELS) and text.embeds.dtype == dtype
    assert torch.equal(text.embeds[0, :count], tokens) and not text.embeds[0, count:].any()
    assert text.mask.sum() == count and text.mask[0, :count].all()
    file = only_file(tmp_path / "text")
    assert file.name == f"{IDENTITY.key('a red circle')}.safetensors" and file.parent.name == file.name[:2]
    assert load_file(file)["tokens"].shape == (count, CAPTION_CHANNELS), "padding is not stored"


def test_the_first_embedding_stands(cache: TextCache) -> None:
    first, second = torch.zeros(3, 4), torch.ones(3, 4)
    cache.put("a", first)
    assert torch.equal(cache.put("a", second), first)
    assert cache.get("b") is None


def _cut(data: bytes) -> bytes:
    return data[:-7]


def _flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _reshape(data: bytes) -> bytes:
    return data.replace(b"[3,4]", b"[4,3]")


def _rename(data: bytes) -> bytes:
    return data.replace(IDENTITY.key("a").encode(), IDENTITY.key("b").encode())


@pytest.mark.parametrize("spoil", [_cut, _flip, _reshape, _rename, lambda _: b"", lambda _: b"\xff" * 64])
def test_a_torn_file_counts_as_none_and_is_replaced(
    cache: TextCache, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    tokens = torch.randn(3, 4)
    cache.put("a", tokens)
    file = only_file(tmp_path / "text")
    whole = file.read_bytes()
    assert spoil(whole) != whole
    file.write_bytes(spoil(whole))
    assert cache.get("a") is None
    assert torch.equal(cache.put("a", tokens), tokens)
    assert torch.equal(cache.get("a"), tokens)


# the source


def test_no_number_of_prompts_pushes_the_negative_one_out(encoder: TextEncoder) -> None:
    source = TextSource(CPU, encode=encoder.encode)
    bad = source.encode("bad", negative=True)
    for index in range(70):
        source.encode(f"prompt {index}")
    assert source.encode("bad", negative=True) is bad
    source.encode("prompt 0")
    assert source.taken() == {"encoder": 72, "memory": 1}, "of prompts the last 64 are remembered"


def test_a_cached_text_asks_for_no_encoder(encoder: TextEncoder, cache: TextCache) -> None:
    asked: list[int] = []
    filling = TextSource(CPU, encode=lambda text: asked.append(1) or encoder.encode(text), cache=cache)
    text = filling.encode("a red circle")
    reading = TextSource(CPU, encode=None, cache=cache)
    found = reading.encode(" a red circle")
    assert torch.equal(found.embeds, text.embeds) and torch.equal(found.mask, text.mask)
    assert (len(asked), filling.taken(), reading.taken()) == (1, {"encoder": 1}, {"cache": 1})
    reading.fetch("a red circle")
    with pytest.raises(EmbeddingMissing, match=r"ltx-batch encode JOB.yaml(.|\n)*'a blue square'"):
        reading.fetch("a blue square")


# renderers


def test_a_renderer_with_a_full_cache_loads_no_encoder(tiny: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "text")
    plain = one(load_renderer(str(tiny), device="cpu"))
    filling, again = (one(load_renderer(str(tiny), device="cpu", text_cache=cache)) for _ in range(2))
    reading = one(load_renderer(str(tiny), device="cpu", text_cache=cache, text="precomputed"))
    assert {clip.frames_sha256() for clip in (filling, again, reading)} == {plain.frames_sha256()}
    assert filling.ran["text"] == {"encoder": 2, "place": "on the device: all parts share one memory"}
    assert again.ran["text"] == {"cache": 2, "place": "not loaded"}
    assert reading.ran["text"] == {"cache": 2, "place": "no text encoder"}


def test_a_render_goes_on_where_its_text_encoder_ran_out_of_memory(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = one(load_renderer(str(tiny), device="cpu"))
    full, relieved, works = [True], [], TextEncoder.encode

    def encode(self: TextEncoder, text: str) -> torch.Tensor:
        if full and full.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return works(self, text)

    monkeypatch.setattr(TextEncoder, "encode", encode)
    monkeypatch.setattr(StepGraphs, "give_up", lambda self: relieved.append(True))
    clip = one(load_renderer(str(tiny), device="cpu"))
    assert clip.frames_sha256() == plain.frames_sha256() and relieved == [True] and not full


def test_a_trace_with_embeddings_needs_no_text_encoder(tiny: Path) -> None:
    whole, bare = (load_renderer(str(tiny), device="cpu", text=text) for text in ("inline", "precomputed"))
    prompt, negative = (whole._pipeline.encode(text) for text in (REQUEST.prompt, REQUEST.negative_prompt))
    given = {
        "prompt_embeds": prompt.embeds,
        "prompt_attention_mask": prompt.mask,
        "negative_prompt_embeds": negative.embeds,
        "negative_prompt_attention_mask": negative.mask,
    }
    assert torch.equal(whole.trace(REQUEST).first_pass, bare.trace(REQUEST, **given).first_pass)
    assert "text_encoder" in whole.weights_bytes and "text_encoder" not in bare.weights_bytes
    with pytest.raises(EmbeddingMissing, match="there is no text cache"):
        bare.trace(REQUEST)


def test_an_encoder_that_cannot_be_loaded_is_told_when_the_renderer_is(tmp_path: Path) -> None:
    spoilt = write_tiny_checkpoint(tmp_path / "spoilt", pipeline_config=CONFIG)
    weights = spoilt / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="text_encoder"):
        load_renderer(str(spoilt), device="cpu")
    load_renderer(str(spoilt), device="cpu", text="precomputed").close()


# jobs


def text_job(tiny: Path, folder: Path, text: str, prompts: list[str] | None = None, **changes: Any) -> JobSpec:
    manifest = write_manifest(folder, prompts or PROMPTS)
    return make_job(
        manifest,
        changes.pop("output", folder / text),
        text=text,
        model={"renderer": "ltx", "checkpoint": str(tiny)},
        defaults={"num_frames": 9},
        worker={"in_flight": 1},
        **changes,
    )


def frames_of(job: JobSpec) -> dict[str, str | None]:
    return {key: record.frames_sha256 for key, record in read_records(job).items()}


def origins(job: JobSpec) -> dict[str, int]:
    """Embeddings of all clips by where they came from."""
    told = [record.ran["text"] for record in read_records(job).values()]
    return {name: sum(one.get(name, 0) for one in told) for name in ("encoder", "cache", "memory")}


def test_three_ways_make_the_same_bits_under_the_same_keys(tiny: Path, tmp_path: Path) -> None:
    inline = text_job(tiny, tmp_path, "inline")
    assert run(inline).text is None
    staged = text_job(tiny, tmp_path, "stage")
    summary = run(staged)
    assert (summary.ok, summary.rendered) == (4, 4)
    assert summary.text is not None and (summary.text["encoded"], summary.text["cached"]) == (3, 0)
    assert len(list((tmp_path / "stage" / "text").rglob("*.safetensors"))) == 3, "two prompts and a negative one"
    precomputed = text_job(tiny, tmp_path, "precomputed", text_cache=str(tmp_path / "stage" / "text"))
    assert run(precomputed).ok == 4
    frames = frames_of(inline)
    assert len(frames) == 4 and len(set(frames.values())) > 1
    assert frames_of(staged) == frames and frames_of(precomputed) == frames
    assert origins(inline) == {"encoder": 3, "cache": 0, "memory": 5}
    assert origins(staged) == origins(precomputed) == {"encoder": 0, "cache": 3, "memory": 5}


def test_another_job_with_the_same_prompts_encodes_nothing(tiny: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "text")
    first = text_job(tiny, tmp_path, "inline", text_cache=cache)
    run(first)
    assert origins(first)["encoder"] == 3
    second = text_job(tiny, tmp_path, "inline", text_cache=cache, output=tmp_path / "second")
    run(second)
    assert origins(second) == {"encoder": 0, "cache": 3, "memory": 5}
    staged = run(text_job(tiny, tmp_path, "stage", text_cache=cache)).text
    assert staged is not None and (staged["encoded"], staged["cached"]) == (0, 3)


def test_only_what_will_be_rendered_is_encoded(tiny: Path, tmp_path: Path) -> None:
    run(text_job(tiny, tmp_path, "inline"))
    longer = text_job(tiny, tmp_path, "stage", [*PROMPTS, "a green cross"], output=tmp_path / "inline")
    summary = run(longer)
    assert (summary.ok, summary.rendered) == (5, 1)
    assert summary.text is not None and summary.text["encoded"] == 2, "its prompt and the negative one"


def test_a_missing_embedding_fails_its_row_alone(tiny: Path, tmp_path: Path) -> None:
    cache = {"text_cache": str(tmp_path / "text"), "batch_size": 4}
    run(text_job(tiny, tmp_path, "stage", PROMPTS, **cache))
    job = text_job(tiny, tmp_path, "precomputed", ["a red circle", "a green cross", "a blue square"], **cache)
    summary = run(job)
    assert (summary.ok, summary.failed, summary.exit_code) == (2, 1, 1)
    (failed,) = [line for line in check_output(job, summary.run).lines if line["ltx_status"] == "failed"]
    assert failed["prompt"] == "a green cross" and failed["ltx_error_class"] == "EmbeddingMissing"
    assert "`ltx-batch encode JOB.yaml`, or set text: stage" in failed["ltx_error"]
    assert failed["ltx_attempts"] == 1
    told = encode(job, RunOptions(retry=True)).text
    assert told is not None and (told["encoded"], told["cached"]) == (1, 1), "of the failed row alone"
    assert run(job, RunOptions(retry=True)).ok == 3


def test_a_torn_embedding_is_encoded_again(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "text"
    whole = text_job(tiny, tmp_path, "stage", text_cache=str(cache))
    run(whole)
    for file in cache.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    again = text_job(tiny, tmp_path, "stage", text_cache=str(cache), output=tmp_path / "again")
    told = run(again).text
    assert told is not None and told["encoded"] == 3
    assert frames_of(again) == frames_of(whole)


def test_a_cache_that_cannot_be_written_stops_the_run(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    summary = run(text_job(tiny, tmp_path, "stage", text_cache=str(tmp_path / "file" / "text")))
    assert summary.exit_code == 3
    assert summary.stopped is not None and summary.stopped.startswith(
        "prompts could not be encoded: NotADirectoryError"
    )


def test_the_phase_alone_binds_no_later_run_to_its_machine(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = text_job(tiny, tmp_path, "precomputed")
    told = encode(job)
    assert told.text is not None and told.text["encoded"] == 3
    assert ledger_of(job).read_run(told.run) is None
    monkeypatch.setattr(LocalPool, "resolve_precision", lambda pool: ("bf16", "timed"))  # as on a machine with a GPU
    assert run(job.model_copy(update={"text": "stage"})).ok == 4
    described = ledger_of(job).read_run(told.run)
    assert described is not None and described["precision"] == "bf16"


def test_nothing_to_encode_is_said_before_anything_is_started(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="has no text_cache to fill"):
        encode(text_job(tiny, tmp_path, "inline"))
    with pytest.raises(JobError, match="is fake"):
        encode(make_job(write_manifest(tmp_path, ["a"]), tmp_path / "out", text="stage"))
    assert run(make_job(write_manifest(tmp_path, ["a"]), tmp_path / "out", text="stage")).ok == 1


def test_a_signal_ends_the_phase_and_the_same_command_goes_on(tiny: Path, tmp_path: Path) -> None:
    job = text_job(tiny, tmp_path, "stage", [f"prompt {index}" for index in range(40)])
    signals = iter([signal.SIGINT])

    def interrupt(told: Any) -> None:
        if told.text is not None:
            for number in signals:
                os.kill(os.getpid(), number)

    summary = run(job, listen=interrupt)
    assert (summary.exit_code, summary.ok) == (3, 0)
    assert summary.text is not None and 0 < summary.text["encoded"] < 41
    again = run(job)
    assert again.ok == 40 and again.text is not None
    assert (again.text["encoded"], again.text["cached"]) == (41 - summary.text["encoded"], summary.text["encoded"])


def test_a_cache_in_an_object_store(tiny: Path, tmp_path: Path, s3_server: S3Server) -> None:
    place = s3_server.uri()
    job = text_job(tiny, tmp_path, "stage", output=place)
    told = run(job).text
    assert told is not None and told["encoded"] == 3
    assert len(Storage(f"{place}/text").list("")) == 3
    local = text_job(tiny, tmp_path, "precomputed", text_cache=f"{place}/text")
    assert run(local).ok == 4
    assert frames_of(local) == frames_of(job)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As jobs set it, so that renderers beside them make the same bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
