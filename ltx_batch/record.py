"""RenderRecord: the one terminal fact about one request."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderRecord:
    """What became of a request. Equal rows share one record, so it holds no row_id.

    `video` is the file's path below the output prefix, `sha256` the hash of that file, `frames_sha256` the hash of the
    pixels before encoding, `seed` the one that was used, wherever it came from. `timings` are seconds by stage, `gpu_seconds` the time a GPU was held for rendering,
    `attempt_id` the name of the try that committed: a store that answers "exists" to our own repeated request is then
    told from a lost race. `retryable` is about a failure alone. `reused` is never stored: it says that this call did not
    render the clip.
    """

    key: str
    status: Literal["ok", "failed"]
    video: str | None = None
    sha256: str | None = None
    video_bytes: int | None = None
    frames_sha256: str | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    frame_rate: float | None = None
    seed: int | None = None
    attempts: int = 1
    attempt_id: str | None = None
    error_class: str | None = None
    error: str | None = None
    retryable: bool = True
    timings: dict[str, float] = field(default_factory=dict)
    gpu_seconds: float = 0.0
    peak_bytes: int | None = None
    ran: dict[str, Any] = field(default_factory=dict)
    degraded: bool = False
    worker: str | None = None
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    finished_at: str | None = None
    schema: int = SCHEMA_VERSION
    reused: bool = False

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    def to_json(self) -> bytes:
        data = asdict(self)
        del data["reused"]
        if self.ok:
            del data["retryable"]
        return json.dumps(data, sort_keys=True, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, text: bytes) -> RenderRecord:
        """Raises ValueError when `text` is not a whole record (a torn or foreign file does not count as a commit)."""
        data = json.loads(text)
        if not isinstance(data, dict) or not {"key", "status"} <= data.keys():
            raise ValueError("not a render record")
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in data.items() if name in known})
