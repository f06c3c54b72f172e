"""RenderRequest: one manifest row with every default resolved, and the key that names its video."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Defaults of the official inference script (Lightricks/LTX-Video, ltx_video/inference.py, InferenceConfig).
DEFAULT_NEGATIVE_PROMPT = "worst quality, inconsistent motion, blurry, jittery, distorted"
DEFAULT_SEED = 171198
MAX_WEIGHT = 3.4e38  # of a LoRA: what float32 holds


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Media as a renderer's `prepare` leaves them, read and cut to length: pixels fp32 [F, 3, H, W] in [-1, 1] as the
    passes take them, or pre-processed frames uint8 RGB [F, H, W, 3] that would be too large so."""

    frames: NDArray[Any]


Media = str | Path | NDArray[np.uint8] | Prepared


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


@dataclass(frozen=True, slots=True)
class LoraRef:
    """A LoRA file and how much of it: the model's weights become W + weight * alpha / rank * B @ A.

    `path` is a path or URI of a safetensors file, `sha256` the hash of its bytes where it is known; a worker refuses a
    file whose bytes differ. `data` are those bytes, where a worker has fetched them ahead.
    """

    path: str | Path
    weight: float = 1.0
    sha256: str | None = None
    data: bytes | None = field(default=None, compare=False, repr=False)

    @property
    def weight32(self) -> float:
        """The weight that is computed with and stands in the key: the nearest float32."""
        return float(np.float32(self.weight))


def parse_lora(text: str) -> LoraRef:
    """`PATH` or `PATH:WEIGHT`, as manifests, job files and the command line write it. Raises ValueError.

    What follows a colon behind the last slash is the weight, so a file with a colon in its own name needs one.
    """
    folder, slash, name = text.rpartition("/")
    name, _, weight = name.rpartition(":") if ":" in name else (name, "", "1")
    if not name.strip():
        raise ValueError("names no file: write it as PATH or PATH:WEIGHT")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not abs(number) <= MAX_WEIGHT:  # so that NaN is wrong too
        raise ValueError(
            f"{weight!r} is no weight: behind the colon belongs a finite number, as in style.safetensors:0.8"
        )
    return LoraRef(folder + slash + name, number)


def lora_set(loras: Iterable[LoraRef]) -> tuple[LoraRef, ...]:
    """The files that have a weight, in an order of their own: how a row lists them changes nothing."""
    counted = (lora for lora in loras if lora.weight32 != 0)
    return tuple(sorted(counted, key=lambda lora: (lora.sha256 or str(lora.path), lora.weight32)))


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
    loras: tuple[LoraRef, ...] = ()

    def __post_init__(self) -> None:
        """Raises TypeError for media that are no Condition: they have a start frame and a strength, too."""
        if not (self.input_media is None or isinstance(self.input_media, Condition)):
            raise TypeError(f"input_media must be Condition(media), found {_told(self.input_media)}")
        if not isinstance(self.conditions, tuple | list):
            raise TypeError(f"conditions must be a tuple of Condition(media), found {_told(self.conditions)}")
        for one in self.conditions:
            if not isinstance(one, Condition):
                raise TypeError(f"conditions must hold Condition(media, start_frame, strength), found {_told(one)}")

    @property
    def lora_set(self) -> tuple[LoraRef, ...]:
        """What the LoRA files come to, see `lora_set`."""
        return lora_set(self.loras)

    def key(self, recipe: Mapping[str, Any]) -> str:
        """sha256 (hex) of all that changes the video: this request and the job's `recipe`.

        Fields at their default are left out, so a later version with new fields keeps old keys. Prompt is always in. For
        many requests of one recipe `Keys` is faster.
        """
        return Keys(recipe).of(self)

    def batch_key(self) -> tuple[Any, ...]:
        """What must be equal for requests to share one forward pass: shape, rate, schedule, guidance, condition layout,
        and the weights themselves."""
        layout = tuple((c.start_frame, canonical(c.strength)) for c in self.conditions)
        timesteps = None if self.timesteps is None else tuple(canonical(self.timesteps))
        return (
            *(self.height, self.width, self.num_frames, canonical(self.frame_rate)),
            *(self.num_inference_steps, timesteps, canonical(self.guidance_scale)),
            *(canonical(self.stg_scale), canonical(self.image_cond_noise_scale)),
            *(canonical(self.decode_timestep), canonical(self.decode_noise_scale)),
            *(layout, self.input_media is not None),
            tuple((lora.sha256 or str(lora.path), lora.weight32) for lora in self.lora_set),
        )

    def changed(self) -> dict[str, Any]:
        """The fields that are not at their default, as JSON material."""
        values = {name: getattr(self, name) for name in _FIELDS}
        if self.loras:
            values["loras"] = self.lora_set
        found = canonical(
            {name: value for name, value in values.items() if value is not _DEFAULTS.get(name, _REQUIRED)}
        )
        return {name: value for name, value in found.items() if value != _DEFAULTS.get(name, _REQUIRED)}


def _told(value: Any) -> str:
    """A wrong value for a message; an array by its type alone."""
    return repr(value) if isinstance(value, str | Path) else type(value).__name__


class Keys:
    """Makes the keys of requests under one recipe, which is serialised and hashed once: it is longer than most requests."""

    def __init__(self, recipe: Mapping[str, Any]) -> None:
        # Canonical JSON of {"recipe": ..., "request": ...}, up to the request.
        self._begun = hashlib.sha256(f'{{"recipe":{_json(canonical(recipe))},"request":'.encode())

    def of(self, request: RenderRequest) -> str:
        """What `RenderRequest.key` says."""
        digest = self._begun.copy()
        digest.update(f"{_json(request.changed())}}}".encode())
        return digest.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def canonical(value: Any) -> Any:
    """`value` as JSON material that does not depend on how it was written.

    Floats go through float32's shortest form and whole ones become ints, so that a float32 column, a float64 column
    and a YAML `30` agree; media and LoRA files count by the hash of their bytes, never by path.
    """
    if isinstance(value, LoraRef):
        if value.sha256 is None:
            raise ValueError(f"the LoRA file {value.path} must be hashed before its request has a key")
        return [value.sha256, canonical(value.weight32)]
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
_FIELDS = tuple(f.name for f in fields(RenderRequest))
_DEFAULTS = {f.name: canonical(f.default) for f in fields(RenderRequest) if f.default is not MISSING}
