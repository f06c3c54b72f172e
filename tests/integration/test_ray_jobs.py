"""Jobs through Ray's job API, on a real cluster of one node with token authentication."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_cluster import BIN, Cluster, start_cluster

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 90 * 2**20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = start_cluster()
    yield cluster
    cluster.stop()


def write_job(folder: Path, *prompts: str, **changes: Any) -> Path:
    """A job file outside the project, with absolute paths."""
    rows = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(prompts)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {
        "manifest": str(folder / "rows.jsonl"),
        "output": str(folder / "out"),
        "model": {"renderer": "fake", "device": "cpu", "precision": "fp32"},
        "workers": 0,
        "defaults": {"height": 32, "width": 32, "num_frames": 3, "frame_rate": 8},
        "attempts": {"max_attempts": 1},
        **changes,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def submit(cluster: Cluster, *words: str | Path, environment: Mapping[str, str] | None = None) -> Any:
    """`submit.py ... --address`, typed outside the project."""
    command = [sys.executable, ROOT / "submit.py", *words, "--address", cluster.address]
    return subprocess.run(
        [str(word) for word in command],
        env=dict(environment or cluster.environment),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def ray_job_submit(cluster: Cluster, *words: str | Path) -> Any:
    """Ray's own client, as the documentation types it."""
    command = [BIN / "ray", "job", "submit", "--address", cluster.address, "--working-dir", ".", "--", "python"]
    return subprocess.run(
        [str(word) for word in [*command, "submit.py", *words]],
        env=cluster.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_submitted_job_runs_on_actors_and_returns_its_summary(cluster: Cluster, tmp_path: Path) -> None:
    """One worker, so that driver, actor and job all come from the folder that was sent."""
    path = write_job(tmp_path, "one", "two", workers=1, worker={"num_cpus": 0.5})
    result = submit(cluster, path, "--json")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["rows"], summary["ok"], summary["rendered"], summary["failed"]) == (2, 2, 2, 0)
    assert "2/2 rows" in result.stderr, "the driver's log is followed"
    assert len(list((tmp_path / "out" / "videos").rglob("*.mp4"))) == 2


def test_ray_job_submit_does_the_same(cluster: Cluster, tmp_path: Path) -> None:
    """A job file of the project, with all that differs on the command line."""
    write_job(tmp_path, "one")
    words = ["jobs/smoke.yaml", "--set", "model.renderer=fake", "--set", "defaults.height=32"]
    result = ray_job_submit(
        cluster, *words, "--manifest", tmp_path / "rows.jsonl", "--output", tmp_path / "out", "--json"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert '"rows": 1, "ok": 1, "failed": 0, "rendered": 1' in result.stdout
    assert len(list((tmp_path / "out" / "videos").rglob("*.mp4"))) == 1


def test_relative_paths_are_refused_on_both_sides(cluster: Cluster, tmp_path: Path) -> None:
    here = submit(cluster, write_job(tmp_path, "one", output="out/here"))
    assert here.returncode == 2
    assert "output: out/here is relative" in here.stderr
    assert "submitted" not in here.stderr
    there = ray_job_submit(cluster, "jobs/smoke.yaml", "--set", "model.renderer=fake")
    assert there.returncode == 1, "Ray reports 1 for any failure"
    assert "failed with exit code 2" in there.stdout + there.stderr
    assert "manifest: jobs/smoke.jsonl is relative" in there.stdout


def test_submitting_twice_starts_one_job_that_ctrl_c_leaves_alone(cluster: Cluster, tmp_path: Path) -> None:
    path = write_job(tmp_path, "slow [sleep 4]", "broken [raise]")
    command = [sys.executable, str(ROOT / "submit.py"), str(path), "--address", cluster.address]
    # A shell has what it starts in the background ignore Ctrl-C, these tests too, and that is inherited.
    first = subprocess.Popen(
        command,
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert first.stderr is not None
    key = re.search(r"submitted to \S+ as (\S+)", first.stderr.readline())
    assert key is not None
    second = subprocess.Popen(
        command, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert second.stderr is not None
    assert second.stderr.readline() == f"this job is on the cluster already; following {key[1]}\n"
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130
    assert f"the job goes on as {key[1]}" in said
    assert f"ray job stop --address {cluster.address} {key[1]}" in said
    printed, said = second.communicate(timeout=60)
    assert second.returncode == 1, said
    assert "2 rows: 1 ok (1 rendered, 0 reused), 1 failed" in printed


@pytest.mark.parametrize("token", [None, "0" * 64], ids=["missing", "wrong"])
def test_refused_token_says_what_to_set(cluster: Cluster, tmp_path: Path, token: str | None) -> None:
    environment = {name: value for name, value in cluster.environment.items() if not name.startswith("RAY_AUTH")}
    if token is not None:
        environment["RAY_AUTH_TOKEN"] = token
    result = submit(cluster, write_job(tmp_path, "one"), "--json", environment=environment)
    assert result.returncode == 2
    assert "set RAY_AUTH_TOKEN" in json.loads(result.stdout)["error"]
    assert "Traceback" not in result.stderr


def test_token_is_found_without_token_mode(cluster: Cluster, tmp_path: Path) -> None:
    """Ray's job client needs RAY_AUTH_MODE as well; a token at hand is enough here. RAY_ADDRESS does not get in between."""
    environment = {name: value for name, value in cluster.environment.items() if name != "RAY_AUTH_MODE"}
    environment["RAY_ADDRESS"] = "http://127.0.0.1:9"
    path = write_job(tmp_path, "one", manifest=str(tmp_path / "absent.parquet"))
    result = submit(cluster, path, environment=environment)
    assert result.returncode == 2, result.stderr
    assert "absent.parquet" in result.stdout, "the job ran, and its own exit code came back"


def test_nobody_at_the_address(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "submit.py"),
        str(write_job(tmp_path, "one")),
        "--address",
        "http://127.0.0.1:9",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 2
    assert "no Ray job server answers at http://127.0.0.1:9" in result.stderr


def test_working_directory_is_small_and_whole(tmp_path: Path) -> None:
    names = _pack(ROOT, tmp_path / "package.zip")
    assert (tmp_path / "package.zip").stat().st_size < LIMIT_BYTES
    assert {"submit.py", "jobs/nightly.yaml", "manifests/demo.parquet", "ltx_batch/cli/__init__.py"} <= names
    assert {name.partition("/")[0] for name in names}.isdisjoint({"out", ".git", ".venv", "tests", ".mypy_cache"})


def test_output_and_caches_stay_behind(tmp_path: Path) -> None:
    """The project's ignore files, in a checkout that has everything that they name."""
    project = tmp_path / "project"
    left = [
        "out/demo/a.mp4",
        ".git/x",
        ".venv/x",
        ".mypy_cache/x",
        ".hidden/x",
        "tests/x",
        "ltx_batch/__pycache__/x.pyc",
    ]
    for name in [*left, "ltx_batch/a.py", "ltx_batch/checkpoints/demo/vae/x.safetensors", "submit.py"]:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    for name in (".gitignore", ".rayignore"):
        (project / name).write_text((ROOT / name).read_text())
    files = {name for name in _pack(project, tmp_path / "package.zip") if not name.endswith("/")}
    assert files - {".gitignore", ".rayignore"} == {
        "ltx_batch/a.py",
        "ltx_batch/checkpoints/demo/vae/x.safetensors",
        "submit.py",
    }


def _pack(project: Path, target: Path) -> set[str]:
    """Ray's own packaging, as its job client calls it; in a process of its own, since Ray logs and keeps state."""
    script = (
        "import sys; from ray._private.ray_constants import get_runtime_env_default_excludes as excludes; "
        "from ray._private.runtime_env.packaging import create_package; from pathlib import Path; "
        "create_package(sys.argv[1], Path(sys.argv[2]), include_gitignore=True, excludes=excludes())"
    )
    subprocess.run([sys.executable, "-c", script, str(project), str(target)], check=True, capture_output=True)
    with zipfile.ZipFile(target) as package:
        return set(package.namelist())
