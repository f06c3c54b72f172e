"""Names of the transformer's modules: what trainers and other tools call them, and what diffusers does."""

from __future__ import annotations

# diffusers says `transformer.`, ComfyUI `diffusion_model.`, the official checkpoints `model.diffusion_model.`; some
# trainers write no prefix.
_PREFIXES = ("transformer.", "model.diffusion_model.", "diffusion_model.")
# Official parts of a name and diffusers' (diffusers, loaders/single_file_utils.py and scripts/convert_ltx_to_diffusers.py).
_PARTS = {"patchify_proj": "proj_in", "adaln_single": "time_embed", "q_norm": "norm_q", "k_norm": "norm_k"}


def diffusers_name(name: str) -> str:
    """The name in diffusers' `LTXVideoTransformer3DModel` of a module or tensor that may have another's name."""
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return ".".join(_PARTS.get(part, part) for part in name.removeprefix(prefix).split("."))
