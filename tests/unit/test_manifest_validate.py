"""validate: what only a whole manifest shows, and that it stays lean."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from manifest_files import DEFAULTS, FORMATS, resolve, write
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFKC
from tokenizers.pre_tokenizers import Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from ltx_batch.errors import CheckpointError, MediaError
from ltx_batch.job import JobSpec, RowDefaults
from ltx_batch.manifest import Manifest, Validation, hash_media, validate, validation
from ltx_batch.manifest.media import MediaLookup
from ltx_batch.request import Condition, RenderRequest

PATHS, FRAMES = "conditioning_media_paths", "conditioning_start_frames"


def check(uri: Path, tokenizer: Path | None = None, defaults: RowDefaults = DEFAULTS) -> Validation:
    job = JobSpec(manifest=str(uri), output="unused", defaults=defaults)
    return validate(Manifest.open(str(uri)), job, tokenizer=tokenizer)


def errors(found: Validation) -> list[tuple[str, int | None, str | None, str]]:
    return [(Path(issue.file).name, issue.row, issue.column, issue.rule) for issue in found.errors]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a word."""
    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "é": 2}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.enable_truncation(100)  # as some checkpoints come; it must not hide what is cut
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    words.save(str(path))
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_a_sound_manifest(tmp_path: Path, kind: str) -> None:
    rows = [{"prompt": "a", "row_id": f"r{n}", "height": 64 + 2 * n} for n in range(1000)]
    assert check(write(tmp_path, rows, kind)) == Validation(rows=1000)


@pytest.mark.parametrize("kind", FORMATS)
def test_all_bad_rows_of_all_files_come_at_once(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a", "row_id": f"a{n}", "seed": n, "height": 64} for n in range(40)]
    rows[3]["prompt"] = None
    rows[17]["seed"] = -1
    write(tmp_path, rows, kind, name="a", group=10)
    others = [{**row, "row_id": f"b{n}", "prompt": "b"} for n, row in enumerate(rows)]
    others[39]["height"] = 31
    write(tmp_path, others, kind, name="b", group=10)
    found = check(tmp_path)
    assert errors(found) == [
        (f"a.{kind}", 3, "prompt", "is missing"),
        (f"a.{kind}", 17, "seed", "must be 0 to 9223372036854775807"),
        (f"b.{kind}", 17, "seed", "must be 0 to 9223372036854775807"),
        (f"b.{kind}", 39, "height", "must be 32 to 8192"),
        (f"b.{kind}", 39, "height", "must be even: video is stored as yuv420p"),
    ]
    assert (found.rows, found.error_count, found.warnings) == (80, 5, [])
    assert sum(row.request is not None for row in resolve(tmp_path)) == 76
    assert json.loads(json.dumps(found.as_dict()))["errors"][1] == {
        "file": str(tmp_path / f"a.{kind}"),
        "row": 17,
        "row_id": "a17",
        "column": "seed",
        "value": -1,
        "rule": "must be 0 to 9223372036854775807",
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_repeated_row_ids_across_row_groups_and_files(tmp_path: Path, kind: str) -> None:
    ids = [f"r{n}" for n in range(30)]
    write(tmp_path, [{"prompt": "a", "row_id": i} for i in [*ids, "r3", None]], kind, name="a", group=8)
    write(tmp_path, [{"prompt": "a", "row_id": i} for i in ["x", "r29", "r3", None]], kind, name="b", group=8)
    found = check(tmp_path)
    assert errors(found) == [
        (f"a.{kind}", 30, "row_id", "is the row_id of row 3 already"),
        (f"b.{kind}", 1, "row_id", f"is the row_id of {tmp_path}/a.{kind} row 29 already"),
        (f"b.{kind}", 2, "row_id", f"is the row_id of {tmp_path}/a.{kind} row 3 already"),
    ]
    assert [issue.row_id for issue in found.errors] == ["r3", "r29", "r3"]


def test_equal_hashes_of_different_ids_are_no_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "hash", lambda row_id: len(row_id), raising=False)
    path = write(tmp_path, [{"prompt": "a", "row_id": i} for i in ("aa", "bb", "cc", "aa")], "csv")
    assert errors(check(path)) == [("rows.csv", 3, "row_id", "is the row_id of row 0 already")]


def test_missing_media_are_named_for_each_row(tmp_path: Path) -> None:
    (tmp_path / "here.png").write_bytes(b"picture")
    (tmp_path / "folder").mkdir()
    media = [["here.png"], ["gone.png"], ["here.png", "gone.png"], ["folder"], None]
    rows = [{"prompt": "a", "row_id": f"r{n}", PATHS: m, FRAMES: [0] * len(m or [])} for n, m in enumerate(media)]
    gone, folder = (f"there is no file {tmp_path}/{name}" for name in ("gone.png", "folder"))
    for kind in FORMATS:
        name = f"rows.{kind}"
        assert errors(check(write(tmp_path, rows, kind))) == [
            *((name, 1, PATHS, gone), (name, 2, PATHS, gone), (name, 3, PATHS, folder))
        ]


@pytest.mark.parametrize("limit", [3, 100])
def test_each_file_is_looked_for_once_and_not_beyond_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    looked: list[str] = []
    monkeypatch.setattr("ltx_batch.manifest.media.exists_uri", lambda uri, _: looked.append(uri))
    monkeypatch.setattr(validation, "MediaLookup", lambda options: MediaLookup(options, limit=limit))
    rows = [{"prompt": "a", "row_id": f"r{n}", PATHS: [f"{n % 4}.png"], FRAMES: [0]} for n in range(12)]
    write(tmp_path, rows[:6], "jsonl", name="a")
    write(tmp_path, rows[6:], "jsonl", name="b")
    found = check(tmp_path)
    expected = min(limit, 4)
    assert looked == [f"{tmp_path}/{n}.png" for n in range(expected)]
    assert found.error_count == 3 * expected


def test_prompts_over_256_tokens_are_a_warning(tmp_path: Path, tokenizer: Path) -> None:
    words = [254, 255, 256, 257, 400]
    rows = [{"prompt": "a " * n, "row_id": f"r{n}", "negative_prompt": "é " * (n - 1)} for n in words]
    for kind in FORMATS:
        found = check(write(tmp_path, rows, kind), tokenizer)
        assert found.errors == []
        assert [(issue.row, issue.column, issue.rule) for issue in found.warnings] == [
            (3, "prompt", "has 257 tokens; the text encoder sees the first 256"),
            (4, "prompt", "has 400 tokens; the text encoder sees the first 256"),
            (4, "negative_prompt", "has 399 tokens; the text encoder sees the first 256"),
        ]
        assert len(found.warnings[0].value) < 257  # a page-long prompt is not printed whole


def test_tokens_are_counted_where_letters_may_be_many(tmp_path: Path) -> None:
    """A tokenizer as fine as can be: each byte a token and an end mark; one Arabic ligature is unfolded into 18 letters."""
    known = {letter: 2 + n for n, letter in enumerate(sorted(set(unicodedata.normalize("NFKC", "ab\ufdfa\ufdfb"))))}
    letters = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, **known}, unk_token="<unk>"))
    letters.normalizer = NFKC()
    letters.pre_tokenizer = Split(Regex("."), "isolated")
    letters.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    letters.save(str(tmp_path / "tokenizer.json"))
    rows = [{"prompt": prompt, "row_id": prompt[:1]} for prompt in ("a" * 255, "b" * 256, "\ufdfa" * 14, "\ufdfb" * 40)]
    found = check(write(tmp_path, rows, "jsonl"), tmp_path / "tokenizer.json")
    counts = [(issue.row, issue.rule.partition(";")[0]) for issue in found.warnings]
    assert counts == [(1, "has 257 tokens"), (3, "has 321 tokens")]


def test_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"is not a tokenizer\.json"):
        check(write(tmp_path, [{"prompt": "a"}], "csv"), tmp_path / "tokenizer.json")


def test_rows_without_seed_and_row_id_are_a_warning(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "seed": 1}, {"prompt": "a", "seed": None}, {"prompt": "a", "seed": None}]
    (warning,) = check(write(tmp_path, rows, "parquet")).warnings
    assert (warning.row, warning.column) == (None, "seed")
    assert warning.rule == (
        "2 row(s) have neither seed nor row_id and take the job's seed 171198: equal ones among them are one video"
    )


def test_a_line_that_is_no_row_is_not_warned_about(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "row_id": "r"}\nnot JSON\n')
    found = check(tmp_path / "rows.jsonl")
    assert (found.error_count, found.warnings) == (1, [])


@pytest.mark.parametrize("kind", FORMATS)
def test_columns_that_look_like_one_of_ours_are_a_warning(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, [{"prompt": "a", "row_id": "r", "num_frame": 9, "fps": 8, "note": "x"}], kind)
    assert [(issue.column, issue.rule) for issue in check(path).warnings] == [
        ("num_frame", "is carried untouched; if you mean num_frames, rename it"),
        ("fps", "is carried untouched; if you mean frame_rate, rename it"),
    ]


def test_the_jobs_defaults_are_told_once_and_with_all_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "a"}, {"prompt": "b"}, {"prompt": None}], "csv")
    found = check(path, defaults=RowDefaults(width=31))
    assert [(issue.file, issue.row, issue.column, issue.value) for issue in found.errors] == [
        ("the job file", None, "defaults.width", 31),
        ("the job file", None, "defaults.width", 31),
        (str(path), 2, "prompt", None),
    ]
    assert [issue.rule[:10] for issue in found.errors[:2]] == ["must be 32", "must be ev"]


def test_issues_beyond_the_cap_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MAX_ISSUES", 5)
    rows = [{"prompt": "", "row_id": f"r{n % 40}"} for n in range(50)]
    found = check(write(tmp_path, rows, "jsonl"))
    assert (found.error_count, len(found.as_dict()["errors"])) == (60, 15)
    assert {issue.rule for issue in found.errors[:5]} == {"is empty"}
    assert [issue.row for issue in found.errors[5:]] == list(range(40, 50))  # every repetition is kept


def test_hash_media_reads_each_file_once_and_trusts_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"abc")
    media = str(tmp_path / "a.png")
    conditions = (Condition(media), Condition(media, 8, 0.5), Condition("s3://nowhere/b.png", 16, 1.0, "0" * 64))
    request = RenderRequest(prompt="a", conditions=conditions)
    cache: dict[str, str] = {}
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    expected = tuple(replace(c, media_sha256=h) for c, h in zip(conditions, (sha256, sha256, "0" * 64), strict=True))
    assert hash_media(request, cache=cache) == replace(request, conditions=expected)
    assert cache == {media: sha256}
    (tmp_path / "a.png").unlink()
    assert hash_media(request, cache=cache).conditions == expected
    with pytest.raises(MediaError, match="there is no file"):
        hash_media(request)


def test_importing_and_validating_load_neither_torch_nor_ray(tmp_path: Path, tokenizer: Path) -> None:
    path = write(tmp_path, [{"prompt": "a " * 300, "row_id": "r"}], "csv")
    script = (
        "import sys; from pathlib import Path; from ltx_batch.job import JobSpec\n"
        "from ltx_batch.manifest import Manifest, validate\n"
        f"found = validate(Manifest.open({str(path)!r}), JobSpec(manifest='m', output='o'), tokenizer=Path({str(tokenizer)!r}))\n"
        "assert found.warning_count == 1, found\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'ray', 'transformers', 'diffusers'}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
