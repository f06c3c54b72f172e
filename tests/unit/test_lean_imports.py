"""What answers at once loads neither torch nor Ray, nor anything that loads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

HEAVY = ("torch", "ray", "transformers", "diffusers", "accelerate", "bitsandbytes")
SCRIPT = """
import sys
from ltx_batch.cli import main
code = main(sys.argv[2:])
print("LOADED", *(name for name in sys.argv[1].split(",") if name in sys.modules))
sys.exit(code)
"""


def heavy_after(*words: str | Path, watched: tuple[str, ...] = HEAVY) -> tuple[list[str], str]:
    """Which of `watched` a verb loads, and what it printed."""
    command = [sys.executable, "-c", SCRIPT, ",".join(watched), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    printed, _, loaded = result.stdout.rpartition("LOADED")
    return loaded.split(), printed


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 local rows, half of them with conditioning media, and a tokenizer to count with."""
    folder = tmp_path_factory.mktemp("lean")
    (folder / "checkpoint" / "tokenizer").mkdir(parents=True)
    Tokenizer(WordLevel({"red": 0, "[UNK]": 1}, "[UNK]")).save(
        str(folder / "checkpoint" / "tokenizer" / "tokenizer.json")
    )
    (folder / "checkpoint" / "scheduler").mkdir()
    (folder / "checkpoint" / "scheduler" / "scheduler_config.json").write_text("{}")
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    media = [["picture.png"] if row % 2 else None for row in range(1000)]
    columns = {
        "row_id": [f"row-{row}" for row in range(1000)],
        "prompt": [f"a red circle number {row} moves right" for row in range(1000)],
        "conditioning_media_paths": media,
        "conditioning_start_frames": [[0] if paths else None for paths in media],
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    path = folder / "job.yaml"
    output, model = str(folder / "out"), {"checkpoint": str(folder / "checkpoint")}
    path.write_text(yaml.safe_dump({"manifest": str(folder / "rows.parquet"), "output": output, "model": model}))
    return path


def test_help_loads_little() -> None:
    loaded, printed = heavy_after("--help", watched=(*HEAVY, "pyarrow", "tokenizers"))
    assert loaded == []
    for verb in ("render", "run", "validate", "plan", "status", "retry", "report", "quality", "encode", "enhance"):
        assert verb in printed


@pytest.mark.parametrize(
    "verb", ["render", "run", "validate", "plan", "status", "retry", "report", "quality", "encode", "enhance"]
)
def test_help_of_every_verb_loads_little(verb: str) -> None:
    loaded, printed = heavy_after(verb, "--help", watched=(*HEAVY, "pyarrow", "tokenizers"))
    assert loaded == []
    assert "--json" in printed


def test_validate_is_lean(job: Path) -> None:
    loaded, printed = heavy_after("validate", job, "--json")
    assert loaded == []
    found = json.loads(printed)
    assert (found["rows"], found["errors"]) == (1000, [])


@pytest.mark.parametrize("verb", ["plan", "status"])
def test_looking_at_a_job_is_lean(job: Path, verb: str) -> None:
    loaded, printed = heavy_after(verb, job, "--json", "--set", "model.renderer=fake")
    assert loaded == []
    assert json.loads(printed)["rows"]


def test_bitsandbytes_is_quiet_before_anything_imports_it() -> None:
    script = """
import logging, sys
import ltx_batch.model
told = logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
sys.exit(told or "bitsandbytes" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


def test_a_run_without_actors_loads_no_ray(job: Path, tmp_path: Path) -> None:
    """And, with colour bars in place of the model, no torch."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n')
    words = ["--manifest", tmp_path / "rows.jsonl", "--output", tmp_path / "out", "--set", "model.renderer=fake"]
    sizes = [word for key in ("height=32", "width=32", "num_frames=3") for word in ("--set", f"defaults.{key}")]
    named = ["--set", "model.precision=fp32", "--set", "video.codec=fake"]
    loaded, printed = heavy_after("run", job, *words, *sizes, *named, "--set", "workers=0", "--json")
    assert loaded == []
    assert json.loads(printed.splitlines()[-1])["rendered"] == 1
