"""A checkpoint at a URI is brought once a machine, by real processes from a server that holds its answer back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ltx_batch.model.fetch import local_checkpoint

BODY = bytes(range(256)) * 4096
BRING = "import sys; from ltx_batch.model.fetch import local_checkpoint; print(local_checkpoint(sys.argv[1]))"


class Held(ThreadingHTTPServer):
    """Serves one file. The first who asks for its bytes gets them after `release`; `asked` counts all who do."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.asked = 0
        self.first, self.release = threading.Event(), threading.Event()
        self.uri = f"http://127.0.0.1:{self.server_port}/ltx.safetensors"


class _Answer(BaseHTTPRequestHandler):
    server: Held

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in (("Content-Length", str(len(BODY))), ("ETag", '"one"'), ("Accept-Ranges", "none")):
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.server.asked == 1:
            self.server.first.set()
            self.server.release.wait(60)
        self.do_HEAD()
        self.wfile.write(BODY)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Held]:
    with Held() as held:
        threading.Thread(target=held.serve_forever, daemon=True).start()
        yield held
        held.release.set()
        held.shutdown()


def bring(server: Held, home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BRING, server.uri],
        env={**os.environ, "XDG_CACHE_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def waits(process: subprocess.Popen[str], server: Held) -> None:
    """Read what the process logs until it says that it waits, or asks for the bytes itself."""
    assert process.stderr is not None
    for line in process.stderr:
        if "this one waits" in line or "brought in" in line:
            return


def test_two_processes_share_one_download(server: Held, tmp_path: Path) -> None:
    first = bring(server, tmp_path)
    assert server.first.wait(60)
    second = bring(server, tmp_path)
    waits(second, server)
    server.release.set()
    told = [process.communicate(timeout=60) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0], told
    assert server.asked == 1
    (place,) = {out.strip() for out, _ in told}
    assert Path(place).read_bytes() == BODY
    assert f"{server.uri}: bringing 0.00 GB to " in told[0][1] and f"{server.uri}: brought in " in told[0][1]
    assert sorted(path.name for path in Path(place).parents[1].iterdir()) == [Path(place).parent.name], "and no rest"


def test_who_waits_for_a_process_that_is_killed_brings_it(server: Held, tmp_path: Path) -> None:
    first = bring(server, tmp_path)
    assert server.first.wait(60)
    second = bring(server, tmp_path)
    waits(second, server)
    first.kill()
    first.communicate()
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert Path(out.strip()).read_bytes() == BODY and server.asked == 2
    assert sorted(path.name for path in Path(out.strip()).parents[1].iterdir()) == [Path(out.strip()).parent.name]


def test_progress_is_said_while_it_lasts(
    server: Held, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("ltx_batch.model.fetch._TELL_EVERY_S", 0.01)
    telling = threading.Thread(target=local_checkpoint, args=(server.uri,))
    telling.start()
    while not any(" of 0.00 GB" in message for message in caplog.messages):
        assert telling.is_alive()
    server.release.set()
    telling.join(60)
    assert caplog.messages[-1].startswith(f"{server.uri}: brought in ")
