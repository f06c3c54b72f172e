"""ffmpeg as a child process: it may be killed, and a crash in a codec is not ours."""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import IO


class FfmpegFailed(Exception):
    """The message holds the first and last lines of ffmpeg's log."""


def run_ffmpeg(
    arguments: Sequence[str], *, feed: Iterable[memoryview] = (), log_level: str = "error", timeout_s: float
) -> tuple[bytes, str]:
    """Run ffmpeg; returns its standard output and its log. Raises FfmpegFailed.

    `feed` goes to its standard input, blocks of any size. It has a process group of its own, since Ctrl-C in a terminal
    means "finish what you have" to us; when we die its pipes close, and it ends.
    """
    import imageio_ffmpeg

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostats", "-y", "-loglevel", log_level, *arguments]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, process_group=0)
        deadline = _Deadline(process, timeout_s)
        try:
            output = _exchange(process, feed)
        finally:
            deadline.cancel()
            process.kill()
            process.wait()
        log.seek(0)
        lines = log.read().decode(errors="replace").strip()
    if deadline.passed:
        raise FfmpegFailed(f"ffmpeg was stopped after {timeout_s:g} s")
    if process.returncode != 0:
        raise FfmpegFailed(gist(lines) or f"ffmpeg ended with code {process.returncode}")
    return output, lines


def gist(log: str) -> str:
    """The first lines of a log, which name the fault, and the last, which say what came of it."""
    lines = [re.sub(r"\[[^\]]* @ 0x[0-9a-f]+\] ", "", line).strip() for line in log.splitlines()]
    return "; ".join(lines if len(lines) <= 5 else [*lines[:2], "...", *lines[-3:]])


class _Deadline:
    """Kills a process when its time is up, and remembers that."""

    def __init__(self, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        self.passed = False
        self._process = process
        self._timer = threading.Timer(timeout_s, self._pass)
        self._timer.start()

    def _pass(self) -> None:
        self.passed = True
        self._process.kill()

    def cancel(self) -> None:
        self._timer.cancel()


def _exchange(process: subprocess.Popen[bytes], feed: Iterable[memoryview]) -> bytes:
    """Write all of `feed`, then read to the end: our commands either read frames or write them, so no pipe can clog."""
    assert process.stdin is not None and process.stdout is not None
    _write_all(process.stdin, feed)
    with process.stdout as stdout:
        output = stdout.read()
    process.wait()
    return output


def _write_all(stdin: IO[bytes], feed: Iterable[memoryview]) -> None:
    with suppress(BrokenPipeError):  # ffmpeg gave up; its exit code and log say why
        for block in feed:
            stdin.write(block)
    with suppress(BrokenPipeError):
        stdin.close()
