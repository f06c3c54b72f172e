"""A checkpoint as loaded: one loader for folders and single files of every size."""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ltx_batch.errors import CheckpointError
from ltx_batch.model.device import free_bytes
from ltx_batch.model.expected import Reading
from ltx_batch.model.memory import GIB
from ltx_batch.model.part import Part, held, read_component
from ltx_batch.model.parts import check_layout, open_checkpoint
from ltx_batch.model.plan import SPATIAL, TEMPORAL
from ltx_batch.model.quantize.by_block import quantize_by_block
from ltx_batch.model.quantize.policy import Precision
from ltx_batch.model.quantize.saved import finish_bitsandbytes, put_blanks
from ltx_batch.model.quantize.stored import Stored
from ltx_batch.model.quantize.swap import check_device
from ltx_batch.model.sigmas import SchedulerConfig
from ltx_batch.model.sizes import text_sizes
from ltx_batch.model.streaming import check_tensors, fill
from ltx_batch.model.text_precision import BLOCKS, DType, text_policy
from ltx_batch.tensor_file import StoredTensor

_CPU = torch.device("cpu")
_ROUNDING_BYTES = GIB  # a block of T5-XXL in 16 bits, and a layer of it in fp32 twice


class TextLoader(Protocol):
    """A text encoder that can be had: its tokenizer, its precision by name, the bytes that it takes, and itself on `device`."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def precision(self) -> str: ...

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
    """A text encoder and its tokenizer, looked at but not loaded. `policy` says how it is held, and `device` where it is
    quantised, wherever it will lie. `reading` is entered whenever files are read."""

    folder: Path
    policy: Precision
    part: Part
    tokenizer: Any
    reading: Reading = nullcontext
    device: torch.device = _CPU

    @classmethod
    def find(
        cls,
        folder: Path,
        dtype: DType,
        reading: Reading = nullcontext,
        *,
        precision: str = "auto",
        device: torch.device = _CPU,
    ) -> TextParts:
        """`dtype` is the transformer's, by name, and `precision` of the text encoder: see `text_policy`.

        Raises CheckpointError where text_encoder/ or tokenizer/ below `folder` are missing, torn or something else, and
        PrecisionError where the precision cannot be had of them, or on `device`.
        """
        check_layout(folder, ("text_encoder", "tokenizer"))
        with reading():
            part = read_component(folder / "text_encoder", "text_encoder")
            tokenizer = _load_tokenizer(folder / "tokenizer")
        if len(tokenizer) > part.config["vocab_size"]:
            raise CheckpointError(
                f"the parts of {folder} are not of one model: the tokenizer knows {len(tokenizer)} tokens, the text "
                f"encoder {part.config['vocab_size']}"
            )
        policy = text_policy(precision, dtype, device.type, part.stored)
        check_device(policy, device)
        return cls(folder, policy, part, tokenizer, reading, device)

    @property
    def channels(self) -> int:
        return int(self.part.config["d_model"])

    @property
    def precision(self) -> str:
        return self.policy.name

    @property
    def weights_bytes(self) -> int:
        return text_sizes(self.part, self.policy).whole_bytes

    def load(self, device: torch.device = _CPU) -> Any:
        """The encoder as its policy says. Raises CheckpointError."""
        model, dtype = build("text_encoder", self.part), getattr(torch, self.policy.dtype)
        with self.reading():
            if self.policy.quantize is None or self.part.stored is not None:
                fill(model, self.part.tensors, dtype, device)
                finish_bitsandbytes(model, self.policy.threshold, device)
            else:
                self._quantize(model, dtype, device)
        return model

    def _quantize(self, model: Any, dtype: torch.dtype, home: torch.device) -> None:
        """Block by block: neither host nor device ever holds the encoder in 16 bits."""
        by_block: defaultdict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for name, tensor in self.part.tensors.items():
            inside = name.startswith(f"{BLOCKS}.")
            by_block[".".join(name.split(".")[:3]) if inside else ""][name] = tensor

        def fill_block(name: str) -> None:
            fill(model, by_block[name], dtype, at if name else home)

        free = free_bytes(self.device)
        at = self.device if free is None or free >= _ROUNDING_BYTES else _CPU
        quantize_by_block(model, self.policy, at, blocks=BLOCKS, home=home, fill=fill_block)


def load_checkpoint(
    place: Path,
    dtype: torch.dtype,
    *,
    text_encoder: Path | None = None,
    upsampler: Path | None = None,
    with_text: bool = True,
    reading_text: Reading = nullcontext,
    text_precision: str = "auto",
    text_device: torch.device = _CPU,
    device: torch.device = _CPU,
) -> Checkpoint:
    """Load every part but the text encoder in `dtype`, straight onto `device`.

    `place` is a folder or an official single file, which holds no text encoder: `text_encoder` names the folder with
    text_encoder/ and tokenizer/, and may do so for a folder too; `reading_text` is entered whenever its files are read, and
    `text_precision` and `text_device` are as in `TextParts.find`.
    `upsampler` names the spatial upscaler's folder or file.
    Beside the weights the host holds one piece of a file. Raises CheckpointError with what was found and what was
    expected, where a part is missing, torn, of another kind, or does not fit the others; but for files that change while
    they are read, before any weight is.
    """
    parts = open_checkpoint(place, upsampler=upsampler)
    text = None
    if with_text:
        plain: DType = "float32" if dtype == torch.float32 else "bfloat16"
        folder = text_encoder or place
        text = TextParts.find(folder, plain, reading_text, precision=text_precision, device=text_device)
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
