"""The `loras` column and key: rules, resolution, files that are missing or do not fit, and what is in a run's name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lora_files import random_pairs, write_lora
from manifest_files import DEFAULTS, FORMATS, resolve, write

from ltx_batch.cli import main
from ltx_batch.errors import CheckpointError, JobError, LoraError, ManifestError
from ltx_batch.job import JobSpec, LoraSpec, parse_job
from ltx_batch.manifest import Manifest, Validation, hash_loras, job_loras, resolve_rows, validate, with_lora_hashes
from ltx_batch.manifest.loras import LoraLookup
from ltx_batch.recipe import run_id
from ltx_batch.request import LoraRef, RenderRequest

TO_Q = "transformer_blocks.0.attn1.to_q"
SHAPES = {TO_Q: (8, 8)}
NUMBER = "behind the colon belongs a finite number, as in style.safetensors:0.8"


def job_of(manifest: Path | str, *loras: Any) -> JobSpec:
    defaults = DEFAULTS.model_dump()
    return parse_job({"manifest": str(manifest), "output": "o", "defaults": defaults, "model": {"loras": list(loras)}})


def check(manifest: Path, *loras: Any) -> Validation:
    return validate(Manifest.open(str(manifest)), job_of(manifest, *loras), tokenizer=None, layers=lambda: SHAPES)


def lora_at(path: Path, seed: int = 0) -> Path:
    return write_lora(path, random_pairs(SHAPES, seed=seed))


# rules


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("loras", "rule"),
    [
        (["a.safetensors", None], "has a null entry"),
        ([" "], "names no file: write it as PATH or PATH:WEIGHT"),
        (["a.safetensors:nan"], f"'nan' is no weight: {NUMBER}"),
        (["b", "a.safetensors:inf"], f"'inf' is no weight: {NUMBER}"),
        (["a.safetensors:1e39"], f"'1e39' is no weight: {NUMBER}"),
        (["a.safetensors:high"], f"'high' is no weight: {NUMBER}"),
        (["a.safetensors", "b", "a.safetensors:0.5"], "names a file twice: give it once, with the sum of the weights"),
    ],
)
def test_a_broken_rule_is_named_with_its_row_and_value(tmp_path: Path, kind: str, loras: list[Any], rule: str) -> None:
    good = {"prompt": "a", "row_id": "good", "loras": ["a.safetensors:0.5", "b.safetensors"]}
    rows = resolve(write(tmp_path, [good, {**good, "row_id": "bad", "loras": loras}, {**good, "row_id": "last"}], kind))
    assert [row.request is None for row in rows] == [False, True, False]
    (issue,) = rows[1].issues
    assert (issue.row, issue.row_id, issue.column, issue.value, issue.rule) == (1, "bad", "loras", loras, rule)


@pytest.mark.parametrize("text", ["a.safetensors", '[{"path": "a.safetensors"}]', "[0.5]", '{"a": 1}'])
def test_csv_cells_are_lists_of_texts(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.csv").write_text('prompt,loras\na,"' + text.replace('"', '""') + '"\n')
    (row,) = resolve(tmp_path / "rows.csv")
    assert [issue.rule for issue in row.issues] == ['must be a list of texts, as JSON, e.g. ["a.png"] or [0, 8]']


def test_a_parquet_column_of_another_type_is_refused(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["a"], "loras": [[{"path": "a.safetensors", "weight": 1.0}]]})
    pq.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ManifestError, match="loras: must be a list of texts, is list"):
        Manifest.open(str(tmp_path / "rows.parquet"))


# what a row gets


@pytest.mark.parametrize("kind", FORMATS)
def test_a_row_wins_over_the_job_and_an_empty_list_is_none(tmp_path: Path, kind: str) -> None:
    lists = [None, [], ["own.safetensors:0.25"], ["s3://bucket/x.safetensors", "/abs/y.safetensors:-1"]]
    manifest = Manifest.open(str(write(tmp_path, [{"prompt": "a", "loras": each} for each in lists], kind)))
    default = (LoraRef("/job/style.safetensors", 0.5),)
    (shard,) = manifest.shards(10)
    rows = resolve_rows(manifest.read(shard), manifest=manifest, shard=shard, defaults=DEFAULTS, loras=default)
    assert [row.request and row.request.loras for row in rows] == [
        default,
        (),
        (LoraRef(str(tmp_path / "own.safetensors"), 0.25),),
        (LoraRef("s3://bucket/x.safetensors", 1.0), LoraRef("/abs/y.safetensors", -1.0)),
    ]


def test_a_manifest_without_the_column_takes_the_jobs(tmp_path: Path) -> None:
    job = job_of("m", "a.safetensors:0.5", {"path": "s3://b/c.safetensors"}, {"path": "/d.safetensors", "weight": 2})
    assert job.model.loras[1] == LoraSpec(path="s3://b/c.safetensors", weight=1.0)
    assert job_loras(job) == (
        LoraRef(str(Path("a.safetensors").absolute()), 0.5),
        LoraRef("s3://b/c.safetensors", 1.0),
        LoraRef("/d.safetensors", 2.0),
    )


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("a.safetensors:much", "'much' is no weight"),
        ({"path": "a", "weight": float("nan")}, "finite number"),
        ({"path": "a", "weight": 1e39}, "less than or equal to 34000"),
        ({"path": ""}, "at least 1 character"),
        ({"weight": 1.0}, "model.loras.0.path: missing"),
        ({"path": "a", "wieght": 1.0}, "model.loras.0.wieght: unknown key"),
    ],
)
def test_a_wrong_job_key_is_named(lora: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        job_of("m", lora)


# files


def test_files_of_rows_are_held_against_the_transformer(tmp_path: Path) -> None:
    lora_at(tmp_path / "good.safetensors")
    write_lora(tmp_path / "other.safetensors", random_pairs({TO_Q: (16, 16)}))
    (tmp_path / "text.safetensors").write_text("no tensors")
    lists = [["good.safetensors:0.5"], ["gone.safetensors"], ["good.safetensors", "other.safetensors"], None]
    lists += [["text.safetensors:0"], ["other.safetensors"]]
    rows = [{"prompt": "a", "row_id": str(n), "loras": each} for n, each in enumerate(lists)]
    found = check(write(tmp_path, rows, "jsonl"))
    issues = [(issue.row, issue.row_id, issue.column, issue.value) for issue in found.errors]
    assert issues == [(n, str(n), "loras", lists[n]) for n in (1, 2, 4, 5)]
    rules = [issue.rule for issue in found.errors]
    assert rules[0] == f"there is no file {tmp_path}/gone.safetensors"
    assert rules[1] == rules[3] and f"{TO_Q} is 16 to 16 in the file and 8 to 8 in the model" in rules[1]
    assert f"{tmp_path}/text.safetensors is not a .safetensors file" in rules[2]


def test_all_faults_of_the_jobs_files_come_at_once(tmp_path: Path) -> None:
    manifest = write(tmp_path, [{"prompt": "a"}], "jsonl")
    good = str(lora_at(tmp_path / "good.safetensors"))
    write_lora(tmp_path / "other.safetensors", random_pairs({"transformer_blocks.9.attn1.to_q": (8, 8)}))
    with pytest.raises(CheckpointError) as caught:
        check(manifest, good, f"{tmp_path}/gone.safetensors", f"{tmp_path}/other.safetensors", f"{good}:0.5")
    gone, other, twice = str(caught.value).splitlines()
    assert gone == f"model.loras: there is no file {tmp_path}/gone.safetensors"
    assert "no linear layers of this transformer: transformer_blocks.9.attn1.to_q" in other
    assert twice == f"model.loras: {good} is named twice: give it once, with the sum of the weights"


def test_the_model_is_looked_at_once_and_only_where_there_are_files(tmp_path: Path) -> None:
    asked: list[int] = []
    lookup = LoraLookup(None, lambda: asked.append(1) or SHAPES)
    assert lookup.look([]) == [] and asked == []
    paths = [str(lora_at(tmp_path / f"{n}.safetensors", n)) for n in range(3)]
    assert lookup.look(paths) == lookup.look(paths) == [] and asked == [1]


def test_only_so_many_files_are_looked_at(tmp_path: Path) -> None:
    lookup = LoraLookup(None, lambda: None, limit=2)
    assert lookup.look(["/no/1", "/no/2", "/no/3"]) == ["there is no file /no/1", "there is no file /no/2"]


def test_json_of_validate_names_row_column_value_and_rule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora_at(tmp_path / "good.safetensors")
    rows = [{"prompt": "a", "loras": ["good.safetensors"]}, {"prompt": "a", "loras": ["gone.safetensors:0.5"]}]
    (tmp_path / "job.yaml").write_text(
        f"manifest: {write(tmp_path, rows, 'csv')}\noutput: {tmp_path}/out\nmodel: {{renderer: fake}}\n"
    )
    assert main(["validate", str(tmp_path / "job.yaml"), "--json"]) == 2
    (error,) = json.loads(capsys.readouterr().out.splitlines()[-1])["errors"]
    assert error == {
        "file": str(tmp_path / "rows.csv"),
        "row": 1,
        "row_id": None,
        "column": "loras",
        "value": ["gone.safetensors:0.5"],
        "rule": f"there is no file {tmp_path}/gone.safetensors",
    }


# hashes, and the run's name


def test_a_file_is_hashed_once_a_call(tmp_path: Path) -> None:
    path, cache = lora_at(tmp_path / "a.safetensors"), {}
    request = RenderRequest(prompt="a", loras=(LoraRef(str(path), 0.5),))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert with_lora_hashes(request, cache=cache).loras == (LoraRef(str(path), 0.5, digest),)
    path.unlink()
    assert with_lora_hashes(request, cache=cache).loras[0].sha256 == digest
    with pytest.raises(LoraError, match=r"no file .*a\.safetensors; there is no file /no/b"):
        hash_loras([*request.loras, LoraRef("/no/b")])


def test_the_jobs_files_are_in_the_runs_name_by_their_bytes(tmp_path: Path) -> None:
    one, copy, two = (lora_at(tmp_path / f"{name}.safetensors", seed) for name, seed in (("1", 0), ("c", 0), ("2", 1)))

    def name(*loras: Any) -> str:
        return run_id([{"sha256": "x", "rows": 1}], {"schema": 1}, job_of("m", *loras))

    assert name(str(one)) == name(str(copy)) == name(f"{one}:1.0")
    assert name(str(one), str(two)) == name(str(two), str(one))
    assert name() == name(f"{one}:0")
    assert len({name(), name(str(one)), name(str(two)), name(f"{one}:0.5"), name(str(one), str(two))}) == 5
    with pytest.raises(CheckpointError, match=r"model\.loras: there is no file /no/a"):
        name("/no/a")
