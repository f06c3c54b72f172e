"""A checkpoint in the folder layout of diffusers' LTX pipelines: one loader for every size."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ltx_batch.errors import CheckpointError
from ltx_batch.model.fetch import SCHEDULER_FILE
from ltx_batch.model.plan import SPATIAL, TEMPORAL
from ltx_batch.model.sigmas import SchedulerConfig

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about a 4-bit kernel that nothing here uses

EXPECTED = {
    "transformer": "LTXVideoTransformer3DModel",
    "vae": "AutoencoderKLLTXVideo",
    "text_encoder": "T5EncoderModel",
    "tokenizer": "a T5 tokenizer",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}
TEXT = ("text_encoder", "tokenizer")
KINDS = {**EXPECTED, "latent_upsampler": "LTXLatentUpsamplerModel"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The parts as loaded, on the CPU; the text encoder is loaded when it is first needed, if ever. None: not asked for."""

    transformer: Any
    vae: Any
    text: TextParts | None
    scheduler: SchedulerConfig
    latent_upsampler: Any = None


@dataclass(frozen=True, slots=True)
class TextParts:
    """A text encoder and its tokenizer, looked at but not loaded. `weights_bytes` is what the encoder takes in `dtype`."""

    folder: Path
    dtype: torch.dtype
    channels: int
    weights_bytes: int
    tokenizer: Any

    @classmethod
    def find(cls, folder: Path, dtype: torch.dtype) -> TextParts:
        """Raises CheckpointError where text_encoder/ or tokenizer/ below `folder` are missing, torn or something else."""
        _check_layout(folder, {name: folder / name for name in TEXT})
        place = folder / "text_encoder"
        config, tokenizer = _check_model("text_encoder", place), _load_tokenizer(folder / "tokenizer")
        if len(tokenizer) > config["vocab_size"]:
            raise CheckpointError(
                f"the parts of {folder} are not of one model: the tokenizer knows {len(tokenizer)} tokens, the text "
                f"encoder {config['vocab_size']}"
            )
        return cls(folder, dtype, config["d_model"], _encoder_weights(place) * dtype.itemsize, tokenizer)

    def load(self) -> Any:
        """The encoder on the CPU. Raises CheckpointError."""
        with _quiet():
            return _load_model("text_encoder", self.folder / "text_encoder", self.dtype)


def load_checkpoint(
    folder: Path, dtype: torch.dtype, *, text_encoder: Path | None = None, with_text: bool = True
) -> Checkpoint:
    """Load every part but the text encoder in `dtype`; `text_encoder` names another folder with text_encoder/ and
    tokenizer/, which need not be there without text.

    Raises CheckpointError with what was found and what was expected where a part is missing, torn, of another kind, or
    does not fit the others.
    """
    text_folder = text_encoder or folder
    parts = [name for name in EXPECTED if with_text or name not in TEXT]
    places = {name: (text_folder if name in TEXT else folder) / name for name in parts}
    _check_layout(folder, places)
    with _quiet():
        found = Checkpoint(
            transformer=_load_model("transformer", places["transformer"], dtype),
            vae=_load_model("vae", places["vae"], dtype),
            text=TextParts.find(text_folder, dtype) if with_text else None,
            scheduler=SchedulerConfig.parse(_read(folder / SCHEDULER_FILE), source=str(folder / SCHEDULER_FILE)),
            latent_upsampler=_load_upsampler(folder / "latent_upsampler", dtype),
        )
    _check_fit(found, folder)
    return found


def _check_layout(folder: Path, places: dict[str, Path]) -> None:
    missing = [name for name, place in places.items() if not place.is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {', '.join(f'{name}/ ({EXPECTED[name]})' for name in missing)}; "
            f"it holds {_held(folder)}. A checkpoint is a folder in diffusers' layout: {'/ '.join(EXPECTED)}/"
        )


def _load_upsampler(place: Path, dtype: torch.dtype) -> Any:
    """None where the folder has none: only multi-scale rendering needs it."""
    if not place.is_dir():
        return None
    return _load_model("latent_upsampler", place, dtype)


def _load_model(name: str, place: Path, dtype: torch.dtype) -> Any:
    _check_model(name, place)
    load, options = _loader(name, dtype)
    try:
        model, notes = load(place, output_loading_info=True, use_safetensors=True, local_files_only=True, **options)
    except Exception as error:
        raise CheckpointError(f"{place} cannot be loaded as {KINDS[name]}: {_first_line(error)}") from error
    _check_keys(name, place, notes)
    return model.eval().requires_grad_(False)


def _check_model(name: str, place: Path) -> dict[str, Any]:
    """Its config.json, once it is of the right kind and has weights beside it."""
    config = _read_json(place / "config.json")
    kinds = [config.get("_class_name"), *config.get("architectures", [])]
    if KINDS[name] not in kinds:
        kind = next((kind for kind in kinds if kind), "no class name")
        raise CheckpointError(f"{place} is not a {KINDS[name]}: its config.json says {kind}")
    if not list(place.glob("*.safetensors")):
        raise CheckpointError(
            f"{place} has no *.safetensors; it holds {_held(place)}. Pickled weights (.bin) are not read"
        )
    return config


def _encoder_weights(place: Path) -> int:
    """How many numbers a T5 encoder's files hold, by their headers alone; a decoder beside it is not loaded.

    Raises CheckpointError for a torn file.
    """
    shapes: dict[str, list[int]] = {}
    for file in sorted(place.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{file} is torn or no safetensors file: {_first_line(error)}") from error
    if "shared.weight" in shapes:
        shapes.pop("encoder.embed_tokens.weight", None)  # the same numbers
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(("shared.", "encoder.")))


def _loader(name: str, dtype: torch.dtype) -> tuple[Callable[..., Any], dict[str, Any]]:
    import diffusers
    import transformers

    if name == "latent_upsampler":
        from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel

        return LTXLatentUpsamplerModel.from_pretrained, {"torch_dtype": dtype}
    if name == "text_encoder":
        return transformers.T5EncoderModel.from_pretrained, {"dtype": dtype}
    return getattr(diffusers, KINDS[name]).from_pretrained, {"torch_dtype": dtype}


def _check_keys(name: str, place: Path, notes: dict[str, Any]) -> None:
    """Weights that are absent would be random, and ones too many are another model's (T5's decoder is neither)."""
    missing = sorted(notes["missing_keys"])
    foreign = [] if name == "text_encoder" else sorted(notes["unexpected_keys"])
    shapes = sorted(map(str, notes["mismatched_keys"]))
    for what, keys in (
        ("lacks", missing),
        ("has tensors that its config.json knows nothing of:", foreign),
        ("has other shapes for", shapes),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise CheckpointError(
                f"{place} {what} {', '.join(keys[:3])}{more}; weights and config.json are not of one model"
            )


def _load_tokenizer(place: Path) -> Any:
    from transformers import AutoTokenizer

    # Without either file transformers makes up a tokenizer that reads every word as unknown, and says nothing.
    if not (place / "tokenizer.json").is_file():
        if not (place / "spiece.model").is_file():
            raise CheckpointError(f"{place} has neither tokenizer.json nor spiece.model; it holds {_held(place)}")
        if not find_spec("sentencepiece"):
            raise CheckpointError(f"{place} has only spiece.model, which takes: pip install sentencepiece protobuf")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{place} is not a tokenizer: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"{place} has no pad token; prompts are padded to 256 tokens")
    return tokenizer


def _check_fit(found: Checkpoint, folder: Path) -> None:
    transformer, vae = found.transformer.config, found.vae.config
    pairs = {
        "transformer in_channels and vae latent_channels": (transformer.in_channels, vae.latent_channels),
        "transformer out_channels and vae latent_channels": (transformer.out_channels, vae.latent_channels),
        "transformer patch sizes and (1, 1)": ((transformer.patch_size, transformer.patch_size_t), (1, 1)),
        "vae spatial compression and 32": (found.vae.spatial_compression_ratio, SPATIAL),
        "vae temporal compression and 8": (found.vae.temporal_compression_ratio, TEMPORAL),
    }
    if found.text is not None:
        channels = (transformer.caption_channels, found.text.channels)
        pairs["transformer caption_channels and text_encoder d_model"] = channels
    faults = [f"{what} must be equal, found {a} and {b}" for what, (a, b) in pairs.items() if a != b]
    if faults:
        raise CheckpointError(f"the parts of {folder} are not of one model: {'; '.join(faults)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return data


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the folder holds {_held(path.parent)}") from None


def _held(folder: Path) -> str:
    """What an error shows of a folder."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return ", ".join(names) or "nothing"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for each part in a worker's log."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
