"""A checkpoint as loaded: one loader for folders and single files of every size."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ltx_batch.errors import CheckpointError
from ltx_batch.model.expected import Reading
from ltx_batch.model.part import Part, held, read_component
from ltx_batch.model.parts import check_layout, open_checkpoint
from ltx_batch.model.plan import SPATIAL, TEMPORAL
from ltx_batch.model.quantize.saved import put_blanks
from ltx_batch.model.quantize.stored import Stored
from ltx_batch.model.sigmas import SchedulerConfig
from ltx_batch.model.streaming import check_tensors, fill

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about a 4-bit kernel that nothing here uses

_CPU = torch.device("cpu")


class TextLoader(Protocol):
    """A text encoder that can be had: its tokenizer, the bytes that it takes, and the encoder itself on `device`."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def weights_bytes(self) -> int: ...

    def load(self, device: torch.device) -> Any: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The parts as loaded; the text encoder is loaded when it is first needed, if ever. None: not there, or not asked for.

    `causal_positions` and `timestep_scale` as in `Parts`. `stored` says how the transformer came quantised.
    """

    transformer: Any
    vae: Any
    text: TextLoader | None
    scheduler: SchedulerConfig
    latent_upsampler: Any = None
    causal_positions: bool = True
    timestep_scale: float = 1000.0
    stored: Stored | None = None


@dataclass(frozen=True, slots=True)
class TextParts:
    """A text encoder and its tokenizer, looked at but not loaded. `weights_bytes` is what the encoder takes in `dtype`.
    `reading` is entered whenever files are read."""

    folder: Path
    dtype: torch.dtype
    part: Part
    tokenizer: Any
    reading: Reading = nullcontext

    @classmethod
    def find(cls, folder: Path, dtype: torch.dtype, reading: Reading = nullcontext) -> TextParts:
        """Raises CheckpointError where text_encoder/ or tokenizer/ below `folder` are missing, torn or something else."""
        check_layout(folder, ("text_encoder", "tokenizer"))
        with reading():
            part = read_component(folder / "text_encoder", "text_encoder")
            tokenizer = _load_tokenizer(folder / "tokenizer")
        if len(tokenizer) > part.config["vocab_size"]:
            raise CheckpointError(
                f"the parts of {folder} are not of one model: the tokenizer knows {len(tokenizer)} tokens, the text "
                f"encoder {part.config['vocab_size']}"
            )
        return cls(folder, dtype, part, tokenizer, reading)

    @property
    def channels(self) -> int:
        return int(self.part.config["d_model"])

    @property
    def weights_bytes(self) -> int:
        shapes = {name: tensor.shape for name, tensor in self.part.tensors.items()}
        if "shared.weight" in shapes:
            shapes.pop("encoder.embed_tokens.weight", None)  # the same numbers
        return sum(map(math.prod, shapes.values())) * self.dtype.itemsize

    def load(self, device: torch.device = _CPU) -> Any:
        """The encoder, in `dtype`. Raises CheckpointError."""
        model = build("text_encoder", self.part)
        with self.reading():
            fill(model, self.part.tensors, self.dtype, device)
        return model


def load_checkpoint(
    place: Path,
    dtype: torch.dtype,
    *,
    text_encoder: Path | None = None,
    upsampler: Path | None = None,
    with_text: bool = True,
    reading_text: Reading = nullcontext,
    device: torch.device = _CPU,
) -> Checkpoint:
    """Load every part but the text encoder in `dtype`, straight onto `device`.

    `place` is a folder or an official single file, which holds no text encoder: `text_encoder` names the folder with
    text_encoder/ and tokenizer/, and may do so for a folder too; `reading_text` is entered whenever its files are read.
    `upsampler` names the spatial upscaler's folder or file.
    Beside the weights the host holds one piece of a file. Raises CheckpointError with what was found and what was
    expected, where a part is missing, torn, of another kind, or does not fit the others; but for files that change while
    they are read, before any weight is.
    """
    parts = open_checkpoint(place, upsampler=upsampler)
    text = TextParts.find(text_encoder or place, dtype, reading_text) if with_text else None
    named = {"transformer": parts.transformer, "vae": parts.vae, "latent_upsampler": parts.latent_upsampler}
    models = {name: build(name, part) for name, part in named.items() if part is not None}
    _check_fit(place, models, text)
    for name, model in models.items():
        fill(model, getattr(parts, name).tensors, dtype, device)
    return Checkpoint(
        **{"latent_upsampler": None, **models},
        text=text,
        scheduler=parts.scheduler,
        causal_positions=parts.causal_positions,
        timestep_scale=parts.timestep_scale,
        stored=parts.transformer.stored,
    )


def load_transformer(place: Path, dtype: torch.dtype) -> Any:
    """The transformer alone, of a folder or a file, in host memory. Raises CheckpointError."""
    part = open_checkpoint(place).transformer
    model = build("transformer", part)
    fill(model, part.tensors, dtype, _CPU)
    return model


def build(name: str, part: Part) -> Any:
    """The model of that name on the meta device, ready for its weights, which fit it. Raises CheckpointError."""
    try:
        with torch.device("meta"):
            model = _construct(name, dict(part.config))
    except Exception as error:
        raise CheckpointError(f"{part.source}: no {name} can be built from its config: {_first_line(error)}") from error
    for path, value in part.attributes.items():
        owner, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(owner), attribute, value)
    for path in part.unused:
        owner, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(owner), attribute, None)
    for convolution in model.modules():
        if name == "vae" and isinstance(convolution, nn.Conv3d):
            convolution.padding_mode = part.padding_mode
    if part.stored is not None:
        put_blanks(model, part.tensors, part.stored, part.source)
    check_tensors(model, part.tensors, part.source)
    return model.eval().requires_grad_(False)


def _construct(name: str, config: dict[str, Any]) -> Any:
    if name == "text_encoder":
        from transformers import T5Config, T5EncoderModel

        return T5EncoderModel(T5Config.from_dict(config))
    if name == "latent_upsampler":
        from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel

        return LTXLatentUpsamplerModel.from_config(config)
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    return (LTXVideoTransformer3DModel if name == "transformer" else AutoencoderKLLTXVideo).from_config(config)


def _load_tokenizer(place: Path) -> Any:
    from transformers import AutoTokenizer

    # Without either file transformers makes up a tokenizer that reads every word as unknown, and says nothing.
    if not (place / "tokenizer.json").is_file():
        if not (place / "spiece.model").is_file():
            raise CheckpointError(f"{place} has neither tokenizer.json nor spiece.model; it holds {held(place)}")
        if not find_spec("sentencepiece"):
            raise CheckpointError(f"{place} has only spiece.model, which takes: pip install sentencepiece protobuf")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    except Exception as error:
        raise CheckpointError(f"{place} is not a tokenizer: {_first_line(error)}") from error
    if tokenizer.pad_token_id is None:
        raise CheckpointError(f"{place} has no pad token; prompts are padded to 256 tokens")
    return tokenizer


def _check_fit(place: Path, models: dict[str, Any], text: TextParts | None) -> None:
    """The configs of the built models against each other and against what the plan counts on."""
    transformer, vae = models["transformer"].config, models["vae"].config
    pairs = {
        "transformer in_channels and vae latent_channels": (transformer.in_channels, vae.latent_channels),
        "transformer out_channels and vae latent_channels": (transformer.out_channels, vae.latent_channels),
        "transformer patch sizes and (1, 1)": ((transformer.patch_size, transformer.patch_size_t), (1, 1)),
        "vae spatial compression and 32": (models["vae"].spatial_compression_ratio, SPATIAL),
        "vae temporal compression and 8": (models["vae"].temporal_compression_ratio, TEMPORAL),
    }
    if text is not None:
        channels = (transformer.caption_channels, text.channels)
        pairs["transformer caption_channels and text_encoder d_model"] = channels
    if "latent_upsampler" in models:
        upsampler = models["latent_upsampler"].config
        pairs["latent_upsampler in_channels and vae latent_channels"] = (upsampler.in_channels, vae.latent_channels)
    faults = [f"{what} must be equal, found {a} and {b}" for what, (a, b) in pairs.items() if a != b]
    if faults:
        raise CheckpointError(f"the parts of {place} are not of one model: {'; '.join(faults)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
