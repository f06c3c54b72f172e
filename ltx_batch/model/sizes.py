"""How large a model will be, from the headers of its files: before a weight is read. No torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping

from ltx_batch.model.memory import ModelSizes
from ltx_batch.model.part import Part, Parts
from ltx_batch.model.placement import SLOTS
from ltx_batch.model.quantize.policy import BLOCKS, Precision, matches
from ltx_batch.model.room import TextSizes
from ltx_batch.model.text_precision import BLOCKS as T5_BLOCKS
from ltx_batch.tensor_file import ITEM_BYTES


def sizes_of(parts: Parts, policy: Precision) -> ModelSizes:
    """Of the parts as that precision holds them."""
    number = _number_bytes(policy)
    blocks, rest = _transformer_bytes(parts.transformer, policy)
    vae: defaultdict[str, int] = defaultdict(int)
    for name, tensor in parts.vae.tensors.items():
        rounded = policy.quantize == "int8-weight" and len(tensor.shape) == 5  # its convolutions are too
        vae[name.partition(".")[0]] += math.prod(tensor.shape) * (1 if rounded else number)
    upsampler = {} if parts.latent_upsampler is None else parts.latent_upsampler.tensors
    config = parts.transformer.config
    return ModelSizes(
        blocks=tuple(blocks[number] for number in sorted(blocks)),
        rest_bytes=rest,
        encoder_bytes=vae["encoder"],
        decoder_bytes=vae["decoder"],
        noisy_decoder=any(parts.vae.config.get("decoder_inject_noise", ())),
        upsampler_bytes=sum(math.prod(tensor.shape) * number for tensor in upsampler.values()),
        channels=config["num_attention_heads"] * config["attention_head_dim"],
        number_bytes=number,
        precision=policy.name,
    )


def text_sizes(part: Part, policy: Precision) -> TextSizes:
    """Of the text encoder as that precision holds it."""
    held = _held(part, policy, T5_BLOCKS)
    taken: defaultdict[str, int] = defaultdict(int)
    for name, tensor in part.tensors.items():
        if name == "encoder.embed_tokens.weight" and "shared.weight" in part.tensors:
            continue  # the same numbers
        inside = name.startswith(f"{T5_BLOCKS}.")
        taken[name.split(".")[2] if inside else ""] += math.prod(tensor.shape) * held(name)
    rest = taken.pop("")
    return TextSizes(rest + sum(taken.values()), rest + SLOTS * max(taken.values()))


def _transformer_bytes(part: Part, policy: Precision) -> tuple[Mapping[int, int], int]:
    """Bytes of each block by its number, and of what lies outside."""
    held = _held(part, policy, BLOCKS)
    blocks: defaultdict[int, int] = defaultdict(int)
    rest = 0
    for name, tensor in part.tensors.items():
        if any(matches(name.rpartition(".")[0], pattern) for pattern in policy.parked):
            continue
        taken = math.prod(tensor.shape) * held(name)
        if name.startswith(f"{BLOCKS}."):
            blocks[int(name.split(".")[1])] += taken
        else:
            rest += taken
    return blocks, rest


def _held(part: Part, policy: Precision, blocks: str) -> Callable[[str], int]:
    """Bytes of a number of the tensor of that name: one in a quantised weight, whose scales do not count."""
    tensors, number = part.tensors, _number_bytes(policy)
    if part.stored is not None:
        return lambda name: 1 if ITEM_BYTES[tensors[name].dtype] == 1 else number
    layers = [name.removesuffix(".weight") for name, one in tensors.items() if _is_matrix(name, one.shape)]
    quantised = {
        f"{name}.weight" for name, how in policy.table(layers, blocks=blocks).items() if how == policy.quantize
    }
    return lambda name: 1 if name in quantised else number


def _is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Of a linear layer; T5's table of distances is an embedding."""
    return name.endswith(".weight") and len(shape) == 2 and "relative_attention_bias" not in name


def _number_bytes(policy: Precision) -> int:
    return 4 if policy.dtype == "float32" else 2
