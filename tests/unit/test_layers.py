"""The layers of pyproject.toml hold, and the contracts that say so can fail."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ltx_batch"


def _lint(root: Path) -> subprocess.CompletedProcess[str]:
    script = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-P", "-c", script, "--no-logo", "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", root)
    shutil.copytree(PACKAGE, root / "ltx_batch", ignore=shutil.ignore_patterns("checkpoints", "__pycache__"))
    return root


def test_layers_hold() -> None:
    result = _lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("record.py", "from ltx_batch.job import JobSpec", "layers BROKEN"),
        ("request.py", "import ltx_batch.record", "layers BROKEN"),
        ("schedule.py", "def later():\n    import torch", "torch and what loads it stay in model/ BROKEN"),
        ("pool.py", "def later():\n    import ray", "Ray stays in ray_pool, ray_text and ray_jobs BROKEN"),
        ("ledger.py", "from fsspec.core import url_to_fs", "fsspec stays in storage BROKEN"),
        ("worker.py", "import imageio_ffmpeg", "ffmpeg stays in media/ BROKEN"),
        ("stray.py", "", "stray"),
    ],
)
def test_a_broken_layer_is_named(copy: Path, module: str, line: str, contract: str) -> None:
    path = copy / "ltx_batch" / module
    before = path.read_text() if path.exists() else None
    path.write_text(f"{before or ''}\n{line}\n")
    try:
        result = _lint(copy)
    finally:
        path.unlink() if before is None else path.write_text(before)
    assert result.returncode != 0
    assert contract in result.stdout


def _imported_on_load(path: Path) -> set[str]:
    """Names of the packages that a file imports when it is loaded, so not those inside functions."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
        pending.extend(ast.iter_child_nodes(node))
    return found


def test_ray_is_imported_inside_functions_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert "ray" not in _imported_on_load(path), f"{path} would load Ray with `ltx-batch --help`"


def test_the_reader_of_imports_tells_functions_from_files(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import os\ntry:\n    import torch.nn\nexcept ImportError:\n    pass\ndef f():\n    import ray\n")
    assert _imported_on_load(path) == {"os", "torch"}
