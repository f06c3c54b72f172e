"""RenderRequest: one manifest row with every default resolved, and the key that names its video."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Defaults of the official inference script (Lightricks/LTX-Video, ltx_video/inference.py, InferenceConfig).
DEFAULT_NEGATIVE_PROMPT = "worst quality, inconsistent motion, blurry, jittery, distorted"
DEFAULT_SEED = 171198

Media = str | Path | NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Condition:
    """Media that the clip must show from `start_frame` on.

    `media` is a path or URI of an image or video, or uint8 RGB frames [F, H, W, 3]. `strength` in 0..1: 1 keeps the
    media as it is, 0 ignores it. `media_sha256` is the hash of the file's bytes where it is known; a worker refuses a
    file whose bytes differ.
    """

    media: Media
    start_frame: int = 0
    strength: float = 1.0
    media_sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderRequest:
    """One clip to render. Field names are those of the official LTX-Video release.

    height, width are pixels (padded to multiples of 32 and cropped back), num_frames is raised to 8k+1 and cropped
    back, frame_rate in Hz is an input of the model. `timesteps` are sigmas in (0, 1], falling, without the final 0.
    A field that is None takes the pipeline config's value, which is part of the recipe and so of the key.
    """

    prompt: str
    negative_prompt: str = DEFAULT_NEGATIVE_PROMPT
    seed: int = DEFAULT_SEED
    height: int = 704
    width: int = 1216
    num_frames: int = 121
    frame_rate: float = 30.0
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    stg_scale: float | None = None
    timesteps: tuple[float, ...] | None = None
    image_cond_noise_scale: float | None = None
    decode_timestep: float | None = None
    decode_noise_scale: float | None = None
    conditions: tuple[Condition, ...] = ()
    input_media: Condition | None = None

    def key(self, recipe: Mapping[str, Any]) -> str:
        """sha256 (hex) of all that changes the video: this request and the job's `recipe`.

        Fields at their default are left out, so a later version with new fields keeps old keys. Prompt is always in.
        """
        changed = {name: value for name, value in self._canonical().items() if value != _DEFAULTS.get(name, _REQUIRED)}
        payload = {"request": changed, "recipe": canonical(recipe)}
        text = json.dumps(payload, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def batch_key(self) -> tuple[Any, ...]:
        """What must be equal for requests to share one forward pass: shape, rate, schedule, guidance, condition layout."""
        layout = tuple((c.start_frame, canonical(c.strength)) for c in self.conditions)
        timesteps = None if self.timesteps is None else tuple(canonical(self.timesteps))
        return (
            *(self.height, self.width, self.num_frames, canonical(self.frame_rate)),
            *(self.num_inference_steps, timesteps, canonical(self.guidance_scale)),
            *(canonical(self.stg_scale), canonical(self.image_cond_noise_scale)),
            *(canonical(self.decode_timestep), canonical(self.decode_noise_scale)),
            *(layout, self.input_media is not None),
        )

    def _canonical(self) -> dict[str, Any]:
        return {f.name: canonical(getattr(self, f.name)) for f in fields(self)}


def canonical(value: Any) -> Any:
    """`value` as JSON material that does not depend on how it was written.

    Floats go through float32's shortest form and whole ones become ints, so that a float32 column, a float64 column
    and a YAML `30` agree; media count by the hash of their bytes, never by path.
    """
    if isinstance(value, Condition):
        return [media_sha256(value), value.start_frame, canonical(value.strength)]
    if isinstance(value, float | np.floating):
        short = float(str(np.float32(value)))
        return int(short) if short.is_integer() else short
    if isinstance(value, Mapping):
        return {str(name): canonical(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return value


def media_sha256(condition: Condition) -> str:
    """The hash that stands for a condition's media in the key; raises ValueError where it has not been made yet."""
    if condition.media_sha256 is not None:
        return condition.media_sha256
    if isinstance(condition.media, np.ndarray):
        digest = hashlib.sha256(repr((condition.media.shape, str(condition.media.dtype))).encode())
        digest.update(np.ascontiguousarray(condition.media).data)
        return digest.hexdigest()
    raise ValueError(f"the media {condition.media!r} must be hashed before its request has a key")


_REQUIRED = object()
_DEFAULTS = {f.name: canonical(f.default) for f in fields(RenderRequest) if f.default is not MISSING}
