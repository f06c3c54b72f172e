"""Which kind of model a .safetensors file holds, by the names of its tensors. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from ltx_batch.errors import CheckpointError
from ltx_batch.tensor_file import TensorFile

CHECKPOINT = "a checkpoint with transformer and VAE"
UPSAMPLER = "a latent upsampler"

# In this order: an LTX-2 file has an LTX-Video's names too, a LoRA those of the layers it changes.
_MARKS = (
    ("a LoRA", ("lora_A", "lora_B", "lora_down", "lora_up", ".lora.")),
    ("an LTX-2 model, which renders sound too", ("audio_", "av_ca_", "vocoder.", "video_embeddings_connector")),
    (UPSAMPLER, ("post_upsample_res_blocks.",)),
    ("a T5 text encoder", ("SelfAttention.", "encoder.embed_tokens", "shared.weight")),
    ("a transformer in diffusers' layout", ("transformer_blocks.0.attn1.norm_q",)),
)
_ADVICE = {
    "a LoRA": "name it in `loras`",
    UPSAMPLER: "name it as model.upsampler",
    "a T5 text encoder": "name the folder that holds text_encoder/ and tokenizer/ as model.text_encoder",
    "a transformer in diffusers' layout": "name the folder that holds transformer/, vae/ and the others",
    "a transformer alone": "take the official file that holds the VAE too",
    "a VAE alone": "take the official file that holds the transformer too",
}


def check_kind(file: TensorFile, expected: str) -> None:
    """Raises CheckpointError where the file holds something else."""
    found = kind_of(file.tensors)
    if found != expected:
        advice = _ADVICE.get(found)
        raise CheckpointError(
            f"{file.source} is {found}; expected {expected}, an official file such as {_example(expected)}"
            + (f". To use this one, {advice}" if advice else "")
        )


def kind_of(names: Iterable[str]) -> str:
    """In words for a message; CHECKPOINT or UPSAMPLER for the kinds that are read."""
    names = list(names)
    for kind, marks in _MARKS:
        if any(mark in name for name in names for mark in marks):
            return kind
    transformer = any("patchify_proj." in name for name in names)
    vae = any("encoder.conv_in.conv." in name or "decoder.conv_in.conv." in name for name in names)
    if transformer or vae:
        return CHECKPOINT if transformer and vae else "a transformer alone" if transformer else "a VAE alone"
    return f"a file of {len(names)} tensors that are not LTX-Video's" + (f", such as {names[0]}" if names else "")


def _example(kind: str) -> str:
    return {CHECKPOINT: "ltxv-13b-0.9.8-distilled.safetensors"}.get(kind, "ltxv-spatial-upscaler-0.9.8.safetensors")
