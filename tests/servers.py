"""Server processes for tests: they listen on loopback, end with the test, and are reached as users reach theirs."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"


@dataclass(frozen=True)
class S3Server:
    """An S3 server that this process and its children reach through environment variables alone."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def uri(self, name: str = "out") -> str:
        """A prefix in a fresh bucket."""
        import s3fs

        bucket = f"bucket-{uuid4().hex[:12]}"
        files = s3fs.S3FileSystem(endpoint_url=self.endpoint, key=ACCESS_KEY, secret=SECRET_KEY)
        files.mkdir(bucket)
        return f"s3://{bucket}/{name}"


@contextmanager
def moto_server() -> Iterator[S3Server]:
    port = free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    with _serving(command, port):
        yield S3Server(f"http://127.0.0.1:{port}")


@contextmanager
def rclone_server(folder: Path) -> Iterator[S3Server]:
    """An S3 server over a folder that, for all its virtues, ignores `If-None-Match`."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("rclone")), "serve", "s3", str(folder)]
    with _serving([*command, "--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"], port):
        yield S3Server(f"http://127.0.0.1:{port}")


@contextmanager
def hub_server(folder: Path, *options: str) -> Iterator[str]:
    """A model hub over a folder of repositories (tests/hub_server.py); its endpoint, for HF_ENDPOINT."""
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("hub_server.py")), str(folder), str(port), *options]
    with _serving(command, port):
        yield f"http://127.0.0.1:{port}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def _serving(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with code {process.returncode}")
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{command[0]} does not answer on port {port}")
        yield
    finally:
        process.kill()
        process.wait()


class FaultyWire:
    """A TCP proxy before a server, for what happens between a store and its client.

    `drop_answer_to`: the answer to the first request whose bytes hold this is lost, after the server did its work.
    `stall_after_bytes`: once so many bytes went up, `stalled` is set and nothing more passes.
    """

    def __init__(self, endpoint: str, *, drop_answer_to: bytes = b"", stall_after_bytes: int | None = None) -> None:
        self._upstream = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.drop_answer_to = drop_answer_to
        self.stall_after_bytes = stall_after_bytes
        self.stalled = threading.Event()
        self.dropped = 0
        self._ended = threading.Event()

    def __enter__(self) -> FaultyWire:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._upstream)
                doomed = threading.Event()
                threading.Thread(target=self._up, args=(client, server, doomed), daemon=True).start()
                threading.Thread(target=self._down, args=(client, server, doomed), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket, doomed: threading.Event) -> None:
        passed = 0
        with suppress(OSError), client, server:
            while data := client.recv(65536):
                if self.drop_answer_to and not self.dropped and self.drop_answer_to in data:
                    self.dropped += 1
                    doomed.set()
                passed += len(data)
                if self.stall_after_bytes is not None and passed > self.stall_after_bytes:
                    self.stalled.set()
                    self._ended.wait()
                    return
                server.sendall(data)

    def _down(self, client: socket.socket, server: socket.socket, doomed: threading.Event) -> None:
        with suppress(OSError), client, server:
            while data := server.recv(65536):
                if doomed.is_set() and not data.startswith(b"HTTP/1.1 100"):
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)
