"""Progress of a real driver process: a panel in a terminal, plain lines in a log; signals drain."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

PROGRAM = [sys.executable, "-c", "import sys; from ltx_batch.cli import main; sys.exit(main())"]
ROW_S = 0.4


def write_job(folder: Path, rows: int, *, later_rows_s: float = ROW_S) -> Path:
    """Rows that take 0.4 s each; those after the first `later_rows_s`."""
    seconds = [ROW_S] + [later_rows_s] * (rows - 1)
    lines = [json.dumps({"prompt": f"[sleep {each}]", "seed": seed}) for seed, each in enumerate(seconds)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    job = {
        "manifest": str(folder / "rows.jsonl"),
        "output": str(folder / "out"),
        "model": {"renderer": "fake", "device": "cpu"},
        "workers": 0,
        "worker": {"in_flight": 1},
        "shard_rows": 2,
        "defaults": {"height": 32, "width": 32, "num_frames": 3, "frame_rate": 8},
        "video": {"codec": "fake"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


class Terminal:
    """A driver whose standard error is a terminal of 100 columns; `seen` is all that it wrote there."""

    def __init__(self, *words: str, **environment: str) -> None:
        ours, theirs = pty.openpty()
        self.seen = ""
        self._ours = ours
        self.process = subprocess.Popen(
            [*PROGRAM, *words],
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
            env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "PYTHONUNBUFFERED": "1", **environment},
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 4096)
            except OSError:  # the other end is closed
                break
            self.seen += data.decode(errors="replace")
        os.close(self._ours)

    def wait_for(self, pattern: str) -> None:
        deadline_s = time.monotonic() + 60
        while not re.search(pattern, self.seen):
            assert time.monotonic() < deadline_s, f"{pattern} is not in {self.seen!r}"
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        printed, _ = self.process.communicate(timeout=60)
        self._reader.join()
        return self.process.returncode, printed


def test_panel_in_a_terminal(tmp_path: Path) -> None:
    terminal = Terminal("run", str(write_job(tmp_path, 4)), "--json")
    code, printed = terminal.end()
    assert code == 0, terminal.seen
    assert json.loads(printed)["rendered"] == 4, "standard output holds the JSON line alone"
    assert "╭─" in terminal.seen, "a panel"
    assert "\x1b[1A" in terminal.seen, "drawn anew in its place"
    assert "4/4 rows, 2/2 shards" in terminal.seen


def test_no_color_leaves_the_panel_uncoloured(tmp_path: Path) -> None:
    coloured = re.compile(r"\x1b\[[0-9;]*3[0-9]")
    job = str(write_job(tmp_path, 2))
    plain = Terminal("run", job, "--output", str(tmp_path / "plain"), NO_COLOR="1")
    assert plain.end()[0] == 0
    assert "╭─" in plain.seen
    assert not coloured.search(plain.seen)
    colourful = Terminal("run", job, "--output", str(tmp_path / "colourful"))
    assert colourful.end()[0] == 0
    assert coloured.search(colourful.seen)


def test_first_ctrl_c_drains_and_says_so(tmp_path: Path) -> None:
    job = write_job(tmp_path, 40)
    terminal = Terminal("run", str(job), "--json")
    terminal.wait_for(r"\b[1-9]\d?/40 rows")
    terminal.process.send_signal(signal.SIGINT)
    code, printed = terminal.end()
    assert code == 3
    assert "draining: rows in workers' hands are finished" in terminal.seen
    summary = json.loads(printed)
    assert 0 < summary["ok"] < 40
    assert "the same command again goes on" in summary["stopped"]
    assert f"ltx-batch run {job}" in terminal.seen.replace("\r", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_second_signal_ends_it_and_leaves_the_cursor(tmp_path: Path, number: signal.Signals, code: int) -> None:
    terminal = Terminal("run", str(write_job(tmp_path, 40, later_rows_s=100)))
    terminal.wait_for(r"\b[1-9]\d?/40 rows")
    terminal.process.send_signal(number)
    terminal.wait_for("draining")
    terminal.process.send_signal(number)
    assert terminal.end()[0] == code
    assert terminal.seen.rfind("\x1b[?25h") > terminal.seen.rfind("\x1b[?25l"), "the cursor is shown"


def test_plain_lines_in_a_log(tmp_path: Path) -> None:
    result = subprocess.run(
        [*PROGRAM, "run", str(write_job(tmp_path, 6))], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stderr
    told = [line for line in result.stderr.splitlines() if "shards" in line]
    assert [re.search(r"(\d)/3 shards", line)[1] for line in told] == ["0", "1", "2", "3"]  # type: ignore[index]
    assert told[-1].startswith("6/6 rows")
    assert "6 rows: 6 ok" in result.stdout
