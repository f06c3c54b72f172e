"""How large a model will be, from the headers of its files: before a weight is read. No torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

from ltx_batch.model.memory import ModelSizes
from ltx_batch.model.part import Part, Parts
from ltx_batch.model.quantize.policy import BLOCKS, Precision, matches
from ltx_batch.tensor_file import ITEM_BYTES


def sizes_of(parts: Parts, policy: Precision) -> ModelSizes:
    """Of the parts as that precision holds them."""
    number = 4 if policy.dtype == "float32" else 2
    blocks, rest = _transformer_bytes(parts.transformer, policy, number)
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


def _transformer_bytes(part: Part, policy: Precision, number: int) -> tuple[Mapping[int, int], int]:
    """Bytes of each block by its number, and of what lies outside. A quantised weight has one byte a number, and scales,
    which do not count."""
    shapes = {name: tensor.shape for name, tensor in part.tensors.items()}
    layers = [
        name.removesuffix(".weight") for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2
    ]
    becomes = {} if part.stored else policy.table(layers)
    blocks: defaultdict[int, int] = defaultdict(int)
    rest = 0
    for name, shape in shapes.items():
        layer = name.rpartition(".")[0]
        if any(matches(layer, pattern) for pattern in policy.parked):
            continue
        quantized = name.endswith(".weight") and becomes.get(layer) not in (None, "fp32", "bf16")
        quantized = quantized or (part.stored is not None and ITEM_BYTES[part.tensors[name].dtype] == 1)
        taken = math.prod(shape) * (1 if quantized else number)
        if name.startswith(f"{BLOCKS}."):
            blocks[int(name.split(".")[1])] += taken
        else:
            rest += taken
    return blocks, rest
