"""Models that are quantised while their weights come: memory holds what is made already, and one block as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ltx_batch.model.quantize.policy import Precision
from ltx_batch.model.quantize.swap import check_device, check_plain, make_layer, put, stored_bytes, told


def quantize_by_block(
    model: nn.Module,
    policy: Precision,
    device: torch.device,
    *,
    blocks: str,
    home: torch.device,
    fill: Callable[[str], None],
) -> dict[str, Any]:
    """Give a model on the meta device its weights, quantised on `device` as the policy says, in `home`.

    `fill` is called with the dotted name of each block, and at last with nothing for what lies outside of them: it puts
    weights there, on `device` for a block and in `home` for the rest. Returns and raises as `quantize_model` does.
    """
    check_device(policy, device)
    check_plain(model)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    table = policy.table(layers, blocks=blocks)
    before_bytes = 0
    for number, block in enumerate(model.get_submodule(blocks).children()):
        name = f"{blocks}.{number}"
        fill(name)
        before_bytes += stored_bytes(block)
        for layer in [one for one in layers if one.startswith(f"{name}.") and table[one] == policy.quantize]:
            plain: Any = model.get_submodule(layer)
            put(model, layer, make_layer(plain, policy, device))
        block.to(home)
        before_bytes -= stored_bytes(block)
    fill("")
    return {**told(policy, table, blocks=blocks), "saved_bytes": before_bytes}
