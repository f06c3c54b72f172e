"""Names of embeddings, and who may be on the device: without torch and without a model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from ltx_batch.errors import CheckpointError, InvalidRow, JobError, RunStopped
from ltx_batch.job import AttemptPolicy, parse_job
from ltx_batch.model.room import GIB, room_to_encode, room_to_render
from ltx_batch.model.text_key import TextIdentity, encoder_fingerprint
from ltx_batch.paths import refuse_local, refuse_relative
from ltx_batch.request import RenderRequest
from ltx_batch.text_phase import _batches, _wanted
from ltx_batch.text_tries import TextTries
from ltx_batch.text_worker import Encoded

FILES = {"text_encoder/model.safetensors": "a" * 64, "tokenizer/tokenizer.json": "b" * 64}
IDENTITY = TextIdentity(encoder_fingerprint(FILES), "bfloat16")


# keys


def test_a_key_stays_what_it_is() -> None:
    """A cache of millions of embeddings hangs on it: if this changes, all of them are encoded anew."""
    assert IDENTITY.key("a red circle") == "6b81592217d1339e59db60e05101c48813cad678852825cec740d347410f2f86"


def test_a_key_hangs_on_what_is_encoded_and_on_nothing_else() -> None:
    key = IDENTITY.key("a red circle")
    assert key == IDENTITY.key("  a red circle\n"), "blanks at the ends are not encoded"
    assert key == TextIdentity(encoder_fingerprint({**FILES, "vae/config.json": "c" * 64}), "bfloat16").key(
        "a red circle"
    )
    others = [
        IDENTITY.key("a red  circle"),
        IDENTITY.key("A red circle"),
        TextIdentity(IDENTITY.encoder, "float32").key("a red circle"),
        *(
            TextIdentity(encoder_fingerprint({**FILES, name: "c" * 64}), "bfloat16").key("a red circle")
            for name in FILES
        ),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_a_checkpoint_without_text_encoder_has_no_fingerprint() -> None:
    with pytest.raises(CheckpointError, match="no text_encoder/ and tokenizer/"):
        encoder_fingerprint({"vae/config.json": "c" * 64})


# room


@pytest.mark.parametrize(
    ("free", "encoder", "enough"),
    [(None, 10**12, True), (11 * GIB, 10 * GIB, True), (11 * GIB - 1, 10 * GIB, False), (0, 0, False)],
)
def test_the_encoder_comes_beside_the_others_where_it_can_work(free: int | None, encoder: int, enough: bool) -> None:
    assert room_to_encode(free, encoder).enough is enough


@pytest.mark.parametrize(("free", "enough"), [(None, True), (40 * GIB, True), (40 * GIB - 1, False)])
def test_the_encoder_stays_while_the_others_have_enough(free: int | None, enough: bool) -> None:
    assert room_to_render(free, 40 * GIB).enough is enough


def test_a_decision_gives_its_reason() -> None:
    assert room_to_render(38 * GIB, 45 * GIB).reason == "rendering this size wants 45.0 GiB, 38.0 GiB are free"
    assert room_to_encode(2 * GIB, 9 * GIB).reason == "the text encoder wants 10.0 GiB, 2.0 GiB are free"
    assert room_to_encode(None, 9 * GIB).reason == "all parts share one memory"


# the texts of a phase


def prepared(*requests: RenderRequest, known: set[int] = frozenset()) -> Iterator[Future[Any]]:
    """A shard whose row i has key str(i); those in `known` have a clip."""
    shard = Future()
    wanted = [(i, str(i), request, 0) for i, request in enumerate(requests)]
    shard.set_result(SimpleNamespace(wanted=wanted, known={str(i): None for i in known}))
    return iter([shard])


def planner(request: RenderRequest) -> Any:
    if request.prompt == "broken":
        raise InvalidRow("no")
    return SimpleNamespace(needs_negative=request.guidance_scale != 1)


def test_rows_without_clip_want_their_prompts_and_negative_ones_under_guidance() -> None:
    requests = [
        RenderRequest(prompt="a", guidance_scale=3.0, negative_prompt="n"),
        RenderRequest(prompt="b", guidance_scale=1, negative_prompt="m"),
        RenderRequest(prompt="c", guidance_scale=3.0, negative_prompt="n"),
        RenderRequest(prompt="d", guidance_scale=3.0, negative_prompt="n"),
    ]
    assert list(_wanted(prepared(*requests, known={2}), planner)) == ["a", "n", "b", "d", "n", None]
    assert list(_wanted(prepared(RenderRequest(prompt="broken")), planner)) == ["broken", None]


def test_a_text_is_asked_for_once() -> None:
    texts = [f"{i % 20} " for i in range(100)] + ["0", None, "", " 21", " "]
    batches = [batch for batch in _batches(iter(texts)) if batch]
    assert batches == [[str(i) for i in range(16)], ["16", "17", "18", "19", "", "21"]]


def test_a_search_without_a_find_says_so_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nobody would look whether the run is to drain."""
    monkeypatch.setattr("ltx_batch.text_phase._POLL_S", 0.0)
    assert list(_batches(iter(["a", None, "a", None]))) == [[], [], [], [], ["a"]]
    slow: Future[Any] = Future()
    texts = _wanted(iter([slow]), planner)
    assert next(texts) is None, "a shard is being prepared"
    slow.set_result(SimpleNamespace(wanted=[(0, "0", RenderRequest(prompt="a", guidance_scale=1), 0)], known={}))
    assert list(texts) == ["a", None]


# attempts of texts


def tries(*batches: list[str], **policy: int) -> TextTries:
    return TextTries(iter(batches), AttemptPolicy(**policy))


def test_a_batch_that_raises_is_tried_again_text_by_text() -> None:
    told = tries(["a", "b"], ["c"])
    batch = told.next()
    assert batch == ["a", "b"] and told.raised(0, batch, OSError("passing")) == Encoded()
    again = [told.next(), told.next()]
    assert sorted(again) == [["a"], ["b"]]
    assert told.next() == ["c"] and told.next() is None
    told.lost([["c"]])
    assert told.next() == ["c"], "of a worker that died"


def test_a_text_that_raises_by_itself_fails_in_the_end_and_no_other_with_it() -> None:
    told = tries(["bad"], ["good"], max_attempts=3)
    seen, failed = [], []
    while (batch := told.next()) is not None:
        seen.append(batch)
        if batch == ["bad"]:
            failed += told.raised(0, batch, RuntimeError("no")).failed
        else:
            told.done(0, batch)
    assert seen.count(["bad"]) == 3 and seen.count(["good"]) == 1
    assert failed == [("bad", "RuntimeError: no")]


def test_a_worker_on_which_every_text_raises_stops_the_phase() -> None:
    told = tries(*([str(index)] for index in range(9)), max_worker_deaths=3)
    told.raised(0, ["0"], OSError("gone"))
    told.raised(0, ["0"], OSError("gone"))
    told.raised(0, ["1"], OSError("gone"))
    told.done(0, ["2"])
    for index in (3, 4):
        told.raised(0, [str(index)], OSError("gone"))
        told.raised(1, [str(index)], OSError("gone"))
    with pytest.raises(RunStopped, match="prompts could not be encoded: OSError: gone"):
        told.raised(0, ["5"], OSError("gone"))


def test_what_no_other_attempt_can_mend_stops_the_phase_at_once() -> None:
    with pytest.raises(RunStopped, match="CheckpointError: torn"):
        tries().raised(0, ["a", "b"], CheckpointError("torn"))


def test_what_is_remembered_of_a_phase_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ltx_batch.text_phase._KNOWN_TEXTS", 2)
    assert [batch for batch in _batches(iter(["a", "b", "a", "c", "a"])) if batch] == [["a", "b", "c", "a"]]


# jobs


@pytest.mark.parametrize(
    ("keys", "uri"),
    [
        ({}, None),
        ({"text": "stage"}, "s3://b/out/text"),
        ({"text": "precomputed"}, "s3://b/out/text"),
        ({"text_cache": "s3://b/text"}, "s3://b/text"),
        ({"text": "stage", "text_cache": "s3://b/text"}, "s3://b/text"),
    ],
)
def test_where_embeddings_are_kept(keys: dict[str, str], uri: str | None) -> None:
    assert parse_job({"manifest": "m", "output": "s3://b/out/", **keys}).text_cache_uri == uri


def test_a_cache_must_be_seen_from_where_the_job_runs() -> None:
    job = parse_job({"manifest": "/m", "output": "s3://b/out", "text_cache": "text"})
    with pytest.raises(JobError, match=r"text_cache: text is relative.* with --set text_cache="):
        refuse_relative(job)
    with pytest.raises(JobError, match=r"--set text_cache=text is a local path and the cluster has 2 nodes"):
        refuse_local(job, 2)


def test_a_phase_is_thought_out_without_torch() -> None:
    script = (
        "import sys, ltx_batch.text_phase, ltx_batch.model.room;"
        "print(sorted({'torch', 'ray', 'transformers', 'safetensors'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == []
