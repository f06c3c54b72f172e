"""Between the passes of a multi-scale render: latents of twice the height and width.

Lightricks/LTX-Video, ltx_video/pipelines/pipeline_ltx_video.py, LTXMultiScalePipeline.
"""

from __future__ import annotations

from typing import Any

import torch

from ltx_batch.model.latents import normalize, unnormalize


def upsample_latents(upsampler: Any, latents: torch.Tensor, vae: Any) -> torch.Tensor:
    """Normalised latents fp32 [B, C, F, H, W] to [B, C, F, 2H, 2W], with the statistics of the small ones."""
    dtype = next(upsampler.parameters()).dtype
    # Row by row: a convolution's result may depend on the batch in its last bits.
    raised = [upsampler(unnormalize(row, vae).to(dtype)).float() for row in latents.split(1)]
    return adain(normalize(torch.cat(raised), vae), latents)


def adain(latents: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Each row and channel of `latents` [B, C, ...] brought to mean and deviation of `reference`'s (arXiv 1703.06868);
    pipeline_ltx_video.py, adain_filter_latent with factor 1."""

    def statistics(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        deviation, mean = torch.std_mean(values.flatten(2), dim=2)
        shape = (*values.shape[:2], *(1 for _ in values.shape[2:]))
        return deviation.view(shape), mean.view(shape)

    deviation, mean = statistics(latents)
    to_deviation, to_mean = statistics(reference)
    return (latents - mean) / deviation * to_deviation + to_mean
