"""Regular Hadamard matrices: rotating groups of inputs spreads an outlier over its group, so that rows round well.

Of the orders 4, 16, 64, 256, as Kronecker powers of one 4 x 4 matrix whose rows all have the same sum (ConvRot, arXiv
2512.03673). The better known construction (Sylvester's) has a column of ones: what is equal in all channels of a group
would pile up in one of them, and inputs of diffusion transformers have such offsets.
"""

from __future__ import annotations

from functools import cache

import torch

_SEED = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))


@cache
def hadamard(group: int) -> torch.Tensor:
    """The matrix of that order, a power of four: fp32 [group, group] on the CPU, symmetric and its own inverse."""
    seed = torch.tensor(_SEED, dtype=torch.float32) / 2
    matrix = torch.ones(1, 1)
    while len(matrix) < group:
        matrix = torch.kron(matrix, seed)
    if len(matrix) != group:
        raise ValueError(f"{group} is no power of four")
    return matrix


def rotate(x: torch.Tensor, group: int) -> torch.Tensor:
    """`x` [..., K] with each run of `group` inputs mixed, computed in fp32; x @ w.T stays when both are rotated."""
    if group == 0:
        return x.float()
    matrix = hadamard(group).to(x.device)
    return (x.float().unflatten(-1, (-1, group)) @ matrix).flatten(-2)


def fitting_group(group: int, inputs: int) -> int:
    """The group that a layer of so many inputs is rotated by: the one asked for, else 64, else none."""
    return next((one for one in (group, 64) if 0 < one <= group and inputs % one == 0), 0)
