"""A Ray cluster of one node for tests: `ray start --head` on free loopback ports, with a token of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
_START_S = 120


@dataclass(frozen=True)
class Cluster:
    address: str
    environment: dict[str, str]
    process: subprocess.Popen[bytes]
    folder: Path

    def stop(self) -> None:
        """End exactly the processes that descend from ours; `ray stop` would end every Ray on the machine."""
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for member in family:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(family, timeout=20)
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def start_cluster() -> Cluster:
    """Returns once the job server answers. The token lies in a file that only this user reads."""
    folder = Path(tempfile.mkdtemp(prefix="rc-"))  # short: Ray puts sockets in it, whose paths may have 107 characters
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
    options = [f"--{name}={port}" for name, port in ports.items()]
    fixed = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=2", "--disable-usage-stats"]
    fixed += [f"--temp-dir={folder}", "--object-store-memory=100000000", "--include-log-monitor=false", "--block"]
    with (folder / "ray-start.log").open("wb") as log:
        command = [str(BIN / "ray"), "start", "--head", *fixed, *options]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    cluster = Cluster(f"http://127.0.0.1:{ports['dashboard-port']}", environment, process, folder)
    try:
        _wait(cluster, token.read_text())
    except BaseException:
        cluster.stop()
        raise
    return cluster


_PORTS = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait(cluster: Cluster, token: str) -> None:
    request = urllib.request.Request(f"{cluster.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s and cluster.process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"Ray did not start: {(cluster.folder / 'ray-start.log').read_text()}")
