"""README and guide have a line for every verb, and for no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ltx_batch.cli import app, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("page", "row"), [("README.md", r"^\| `ltx-batch (\w+)"), ("docs/guide.md", r"^\| `(\w+) [A-Z]")]
)
def test_every_verb_has_its_line(page: str, row: str) -> None:
    callbacks = [command.callback for command in app.registered_commands]
    verbs = sorted(callback.__name__ for callback in callbacks if callback is not None)
    assert sorted(re.findall(row, (ROOT / page).read_text(), re.M)) == verbs


def test_help_is_cut_nowhere(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """However narrow the terminal is."""
    monkeypatch.setenv("COLUMNS", "80")
    main(["render", "--help"])
    printed = capsys.readouterr().out
    for name in ("media-paths", "start-frames", "strengths"):
        assert f"--conditioning-{name} " in printed
    main(["--help"])
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2], "each verb's line is whole"
