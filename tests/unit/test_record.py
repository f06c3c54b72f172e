"""Records: what is stored, and what counts as one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from ltx_batch.record import SCHEMA_VERSION, RenderRecord

WHOLE = RenderRecord(
    key="ab" * 32,
    status="ok",
    video="videos/ab/x.mp4",
    sha256="cd" * 32,
    video_bytes=1234,
    attempts=2,
    timings={"render": 1.5},
    ran={"precision": "bf16"},
    versions={"torch": "2.13"},
)


def test_a_record_survives_its_file() -> None:
    assert RenderRecord.from_json(WHOLE.to_json()) == WHOLE


def test_the_file_is_readable_and_says_its_schema() -> None:
    text = WHOLE.to_json().decode()
    assert json.loads(text)["schema"] == SCHEMA_VERSION and text.endswith("}\n") and text.count("\n") > 10


def test_reused_is_of_a_call_and_never_stored() -> None:
    reused = replace(WHOLE, reused=True)
    assert reused.to_json() == WHOLE.to_json()
    assert RenderRecord.from_json(reused.to_json()).reused is False


@pytest.mark.parametrize(
    "text", [b"", b"{", WHOLE.to_json()[:-20], b"[]", b"null", b"{}", b'{"key": "ab"}', b"\xff\xfe"]
)
def test_what_is_not_a_whole_record_does_not_count(text: bytes) -> None:
    with pytest.raises(ValueError):
        RenderRecord.from_json(text)


def test_fields_of_a_later_version_are_passed_over() -> None:
    data = json.loads(WHOLE.to_json()) | {"from_the_future": 1}
    assert RenderRecord.from_json(json.dumps(data).encode()) == WHOLE


@pytest.mark.parametrize(("status", "ok"), [("ok", True), ("failed", False)])
def test_ok_is_the_status(status: str, ok: bool) -> None:
    assert RenderRecord(key="k", status=status).ok is ok  # type: ignore[arg-type]
