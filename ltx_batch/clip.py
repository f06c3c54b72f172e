"""What a renderer returns for one request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Clip:
    """A rendered clip.

    `frames` is uint8 [F, H, W, 3] RGB, `frame_rate` in Hz. `timings` holds seconds by stage (`text`, `condition`,
    `denoise`, `decode`), `ran` what really ran (precision, device, kernels, `degraded`), `peak_bytes` the peak of
    device memory or None where the device does not say.
    """

    frames: NDArray[np.uint8]
    frame_rate: float
    timings: dict[str, float] = field(default_factory=dict)
    ran: dict[str, Any] = field(default_factory=dict)
    peak_bytes: int | None = None

    @property
    def suffix(self) -> str:
        """Of the clip's file: one frame is a picture."""
        return ".png" if len(self.frames) == 1 else ".mp4"

    def frames_sha256(self) -> str:
        """Hash of shape and pixels before any encoding: equal hashes are equal pictures."""
        digest = hashlib.sha256(repr(self.frames.shape).encode())
        digest.update(np.ascontiguousarray(self.frames).data)
        return digest.hexdigest()
