"""Ray's job API: submit a command with the project's folder, follow its log, learn its exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ltx_batch.errors import JobError, RunStopped

_RECONNECT_S = 3.0
_RECONNECTS = 100  # in a row without a line between them: five minutes without the head end the following, not the job
_SETTLE_S = 30.0  # the log may end some moments before Ray writes down the exit code
_STOPPED = 3


class RayJobs:
    """A cluster's job server, at `http://head:8265`. Raises JobError where it cannot be used."""

    def __init__(self, address: str) -> None:
        self.address = _checked(address)
        _use_token(os.environ)
        with _explained(self.address), _only_this_address():
            from ray.job_submission import JobSubmissionClient

            for handler in logging.getLogger("ray").handlers:  # else it tells of every file that it leaves out
                handler.setLevel(logging.ERROR)
            self._client = JobSubmissionClient(self.address)

    def submit(self, name: str, entrypoint: str, working_dir: Path, metadata: Mapping[str, str]) -> tuple[str, bool]:
        """Start a job, unless one of the same `name` is waiting or running: submitting twice starts one job.

        Returns the submission id and whether it is new. Ray accepts an id once, so ids are `name-1`, `name-2`, ...
        """
        with _explained(self.address):
            jobs = {job.submission_id: job for job in self._client.list_jobs()}
            earlier = [key for key in jobs if key is not None and key.rpartition("-")[0] == name]
            for key in earlier:
                if not jobs[key].status.is_terminal():
                    return key, False
            key = f"{name}-{1 + max((int(key.rpartition('-')[2]) for key in earlier), default=0)}"
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=key,
                    runtime_env={"working_dir": str(working_dir)},
                    metadata=dict(metadata),
                )
            except RuntimeError:
                if any(job.submission_id == key for job in self._client.list_jobs()):  # somebody was faster
                    return key, False
                raise
            return key, True

    def follow(self, key: str, write: Callable[[str], None]) -> int:
        """Pass the job's log on until the job ends; returns its driver's exit code.

        A job that was stopped or never ran has none, and counts as 3. Raises RunStopped when the head is out of reach
        for too long: the job may still be going.
        """
        from aiohttp import ClientError

        seen = tries = 0
        while True:
            try:
                seen, before = asyncio.run(self._tail(key, write, seen)), seen
                job = self._client.get_job_info(key)
                if job.status.is_terminal():
                    return self._exit_code(key)
                tries = 0 if seen > before else tries
            except (ClientError, RuntimeError, OSError) as error:
                if tries >= _RECONNECTS:
                    raise RunStopped(f"{self.address} is out of reach ({error}); {self.how_to_go_on(key)}") from error
            tries += 1
            time.sleep(_RECONNECT_S)

    def how_to_go_on(self, key: str) -> str:
        return (
            f"the job goes on as {key}: the same command follows it again, "
            f"`ray job stop --address {self.address} {key}` stops it"
        )

    async def _tail(self, key: str, write: Callable[[str], None], seen: int) -> int:
        """Ray sends a log from its start; `seen` characters of it are known. Returns how many are then."""
        at = 0
        async for text in self._client.tail_job_logs(key):
            if at + len(text) > seen:
                write(text[max(0, seen - at) :])
            at += len(text)
            seen = max(seen, at)
        return seen

    def _exit_code(self, key: str) -> int:
        deadline_s = time.monotonic() + _SETTLE_S
        while True:
            job = self._client.get_job_info(key)
            if job.driver_exit_code is not None:
                return job.driver_exit_code if job.driver_exit_code >= 0 else 128 - job.driver_exit_code
            if job.status == "STOPPED":
                return _STOPPED
            if time.monotonic() > deadline_s or job.error_type not in (None, "JOB_ENTRYPOINT_COMMAND_ERROR"):
                raise RunStopped(
                    f"the job {key} ended without an exit code ({job.message}); `ray job logs --address {self.address} "
                    f"{key}` has its log, and the same command starts it again where it stopped"
                )
            time.sleep(0.5)


def _checked(address: str) -> str:
    if address.startswith(("http://", "https://")):
        return address.rstrip("/")
    if "://" in address:
        raise JobError(f"--address {address}: give the address of Ray's job server, e.g. http://head:8265")
    return f"http://{address}"


def _use_token(environment: Any) -> None:
    """Ray's job client sends a token only in token mode, which `ray.init` turns on by itself where a token is at hand."""
    default = Path.home() / ".ray" / "auth_token"
    at_hand = "RAY_AUTH_TOKEN" in environment or "RAY_AUTH_TOKEN_PATH" in environment or default.is_file()
    if at_hand:
        environment.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def _only_this_address() -> Iterator[None]:
    """Ray lets its variables win over the address that it is given; here the user's word on the command line wins."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Faults before anything was started, as JobError."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        reason = str(error.message).partition("\n")[0]
        raise JobError(
            f"{address} refuses this client ({reason}): set RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH "
            "to a file that holds it"
        ) from None
    except OSError as error:  # requests' errors are OSErrors
        raise JobError(
            f"no Ray job server answers at {address}: {error} Its port is the dashboard's, 8265; from outside the "
            "cluster try `ssh -L 8265:localhost:8265 HEAD` or `kubectl port-forward`, and --address http://localhost:8265"
        ) from None
    except (RuntimeError, ValueError) as error:
        raise JobError(
            f"{address} did not take the job, so nothing was started; mend this and give the same command again: {error}"
        ) from None
