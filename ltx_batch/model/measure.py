"""What modules take of memory."""

from __future__ import annotations

from typing import Any

from torch import nn

from ltx_batch.model.memory import ModelSizes
from ltx_batch.model.quantize.swap import stored_bytes


def weights_bytes(module: nn.Module) -> int:
    """Parameters, buffers, and the scales that bitsandbytes keeps beside them."""
    return stored_bytes(module)


def measure(transformer: Any, vae: Any, upsampler: Any | None, precision: str) -> ModelSizes:
    """The sizes of a model whose layers are what they will be; those that wait in host memory do not count."""
    blocks = [weights_bytes(block) for block in transformer.transformer_blocks]
    rest = weights_bytes(transformer) - sum(blocks)
    parked = [getattr(block, "parked_layers", ()) for block in transformer.transformer_blocks]
    return ModelSizes(
        blocks=tuple(one - sum(map(weights_bytes, layers)) for one, layers in zip(blocks, parked, strict=True)),
        rest_bytes=rest,
        encoder_bytes=weights_bytes(vae.encoder),
        decoder_bytes=weights_bytes(vae.decoder),
        noisy_decoder=any(vae.config.decoder_inject_noise),
        upsampler_bytes=0 if upsampler is None else weights_bytes(upsampler),
        channels=transformer.config.num_attention_heads * transformer.config.attention_head_dim,
        number_bytes=transformer.dtype.itemsize,
        precision=precision,
    )
