"""Prompts that the tokenizer cannot read, or not to the end: warnings of `validate`, row by row."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from manifest_files import write
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from ltx_batch.errors import CheckpointError
from ltx_batch.foresight import tokenizer_file
from ltx_batch.job import JobSpec, ModelSpec
from ltx_batch.manifest import Manifest, Validation, tokens, validate
from ltx_batch.manifest.tokens import share_in

ENGLISH, CHINESE = "a red circle moves right", "一个红色的圆圈向右移动"


def check(folder: Path, prompts: Sequence[str], tokenizer: Path, **columns: Sequence[Any]) -> Validation:
    rows = [
        {"prompt": prompt, "row_id": f"r{i}", **{name: values[i] for name, values in columns.items()}}
        for i, prompt in enumerate(prompts)
    ]
    path = write(folder, rows, "parquet")
    return validate(Manifest.open(str(path)), JobSpec(manifest=str(path), output="unused"), tokenizer=tokenizer)


def unread(found: Validation) -> list[tuple[int | None, str | None, str]]:
    """Row, column and the rule's share."""
    mark = "letters that the tokenizer does not know; the text encoder hardly sees them"
    assert found.errors == [] and all(mark in warning.rule for warning in found.warnings)
    return [(issue.row, issue.column, issue.rule.split()[1]) for issue in found.warnings]


def unigram(folder: Path, *, byte_fallback: bool) -> Path:
    """As T5's is built: pieces with a mark for blanks, and what is in none of them is `<unk>`, or bytes."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -2.0) for piece in ("▁", *(f"▁{word}" for word in ENGLISH.split()))]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyzé"]
    pieces += [(f"<0x{value:02X}>", -20.0) for value in range(256 if byte_fallback else 0)]
    made = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=byte_fallback))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def spiece(folder: Path) -> Path:
    """Trained by the library that T5's was."""
    model = io.BytesIO()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    texts = iter([ENGLISH, "a blue square over a white background", "café"] * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts, model_writer=model, vocab_size=34, hard_vocab_limit=False, minloglevel=2, **ids
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder / "spiece.model"


@pytest.fixture(params=["unk", "bytes", "spiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "spiece":
        return spiece(tmp_path / "tokenizer")
    return unigram(tmp_path / "tokenizer", byte_fallback=request.param == "bytes")


def test_a_prompt_in_letters_it_does_not_know_is_a_warning(tmp_path: Path, tokenizer: Path) -> None:
    prompts = [ENGLISH, CHINESE, f"{ENGLISH} {CHINESE}", "a red café 🎬", f"{ENGLISH} {CHINESE[:4]}", "Ω"]
    assert unread(check(tmp_path, prompts, tokenizer)) == [
        (1, "prompt", "100%"),
        (2, "prompt", "35%"),
        (5, "prompt", "100%"),
    ]


def test_the_negative_prompt_is_read_too(tmp_path: Path, tokenizer: Path) -> None:
    negatives = [None, CHINESE, "a red circle", CHINESE]
    found = check(tmp_path, [ENGLISH, ENGLISH, ENGLISH, CHINESE], tokenizer, negative_prompt=negatives)
    assert unread(found) == [
        (1, "negative_prompt", "100%"),
        (3, "prompt", "100%"),
        (3, "negative_prompt", "100%"),
    ]


def test_a_prompt_can_be_both_cut_and_unread(tmp_path: Path) -> None:
    found = check(tmp_path, ["一 " * 300, "é " * 300], unigram(tmp_path / "tokenizer", byte_fallback=True))
    rules = [(warning.row, " ".join(warning.rule.split()[1:3])) for warning in found.warnings]
    assert rules == [(0, "1202 tokens;"), (0, "100% letters"), (1, "602 tokens;")]


def test_tokens_are_counted_by_a_spiece_model(tmp_path: Path) -> None:
    """One letter, one piece, and the end mark that the encoder is given."""
    found = check(tmp_path, ["é" * 254, "é" * 255, "é" * 400], spiece(tmp_path / "tokenizer"))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer" / "spiece.model"))
    counts = {row: len(processor.encode("é" * letters)) + 1 for row, letters in enumerate((254, 255, 400))}
    told = {warning.row: int(warning.rule.split()[1]) for warning in found.warnings}
    assert told == {row: count for row, count in counts.items() if count > 256}
    assert 2 in told and 0 not in told


@pytest.mark.parametrize(
    ("text", "spans", "share"),
    [
        ("abcd", [], 0),
        ("abcd", [(0, 2)], 0.5),
        ("abcd", [(0, 2), (1, 3), (1, 3)], 0.75),
        ("a  b", [(0, 3)], 0.5),
        ("  ", [(0, 2)], 0),
    ],
)
def test_the_share_counts_letters_once_and_no_blanks(text: str, spans: list[tuple[int, int]], share: float) -> None:
    assert share_in(text, spans) == share


def test_why_nothing_is_counted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "find_spec", lambda name: None)
    (warning,) = check(tmp_path, [CHINESE], spiece(tmp_path / "tokenizer")).warnings
    assert warning.row is None and warning.rule.endswith("spiece.model, which takes: pip install sentencepiece")


def test_a_spiece_model_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="is not a SentencePiece model"):
        check(tmp_path, [ENGLISH], tmp_path / "spiece.model")


def test_a_checkpoints_tokenizer_is_found_in_either_form(tmp_path: Path) -> None:
    model = ModelSpec(checkpoint=str(tmp_path))
    assert tokenizer_file(model)[0] is None
    old = spiece(tmp_path / "tokenizer")
    assert tokenizer_file(model) == (old, [])
    new = unigram(tmp_path / "tokenizer", byte_fallback=False)
    assert tokenizer_file(model) == (new, []), "the fast one, where there are both"
