"""The demo manifest: what make_demo writes, within the contract, and as its README says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from manifest_files import DEFAULTS, resolve
from PIL import Image

from ltx_batch.job import load_job
from ltx_batch.manifest import COLUMNS, Manifest, hash_media, validate
from manifests import make_demo

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "manifests"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_demo.write(folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    found = [folder / "demo.parquet", *sorted((folder / "media").iterdir())]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_two_runs_write_the_same_bytes(made: Path, tmp_path: Path) -> None:
    make_demo.write(tmp_path)
    assert files(tmp_path) == files(made)


def test_the_committed_files_are_what_the_script_writes(made: Path) -> None:
    """Rows and pixels, not bytes: other versions of Arrow and zlib pack them otherwise."""
    assert files(FOLDER).keys() == files(made).keys()
    assert pq.read_table(FOLDER / "demo.parquet").equals(pq.read_table(made / "demo.parquet"))
    for picture in sorted((made / "media").iterdir()):
        with Image.open(picture) as new, Image.open(FOLDER / "media" / picture.name) as old:
            difference = np.abs(np.asarray(new, np.int16) - np.asarray(old, np.int16))
        assert difference.max() <= 1, picture.name  # of 255: another processor may round a tie otherwise


def test_it_validates_with_the_demo_job() -> None:
    found = validate(Manifest.open(str(FOLDER / "demo.parquet")), load_job(ROOT / "jobs" / "demo.yaml"), tokenizer=None)
    assert (found.errors, found.warnings) == ([], [])
    assert found.rows >= 28


def test_it_has_four_sizes_and_every_kind_of_condition() -> None:
    requests = [row.request for row in resolve(FOLDER / "demo.parquet") if row.request]
    assert len({(r.height, r.width, r.num_frames) for r in requests}) >= 4
    assert len({(r.prompt, r.seed) for r in requests}) == len(requests)
    layouts = {tuple((c.start_frame, round(c.strength, 3)) for c in r.conditions) for r in requests}
    assert layouts == {(), ((0, 1.0),), ((16, 1.0),), ((8, 1.0),), ((0, 1.0), (16, 1.0)), ((0, 0.9),)}
    for request in requests:
        assert all(c.media_sha256 for c in hash_media(request).conditions)
        for condition in request.conditions:
            with Image.open(str(condition.media)) as picture:
                assert (picture.height, picture.width) == (request.height, request.width)


def test_prompts_say_what_the_other_columns_say() -> None:
    words = {"circle": "circle|ball|disc", "square": "square|box", "cyan": "cyan|turquoise"}
    ways = {"up": "up", "down": "down|lower", "left": "left", "right": "right"}
    for row in pq.read_table(FOLDER / "demo.parquet").to_pylist():
        said = row["prompt"].lower()
        assert re.search(words.get(row["shape"], row["shape"]), said), said
        assert re.search(words.get(row["colour"], row["colour"]), said), said
        for way in row["direction"].split("-"):
            assert re.search(ways[way], said), said


def test_the_readme_names_every_column() -> None:
    named = set(re.findall(r"`(\w+)`", (FOLDER / "README.md").read_text().partition("## The three formats")[0]))
    assert named >= COLUMNS.keys()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_the_examples_of_the_readme_are_manifests(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (FOLDER / "README.md").read_text()
    (example,) = re.findall(
        rf"```{ {'jsonl': 'json', 'parquet': 'python'}.get(kind, kind) }\n(.*?)```", text, re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    if kind == "parquet":
        exec(example)
    else:
        Path(f"shots.{kind}").write_text(example)
    rows = [row.request for row in resolve(tmp_path / f"shots.{kind}", defaults=DEFAULTS)]
    assert [len(row.conditions) for row in rows if row] == [0, 1]
