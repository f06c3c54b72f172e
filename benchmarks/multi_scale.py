"""What the second pass of a multi-scale render adds: the demo checkpoint at 256x256, beside a plain 2x of its first pass.

    python benchmarks/multi_scale.py [--picture docs/images/multi-scale.png]

The picture shows a few chosen clips: the first pass decoded and enlarged bilinearly, and the finished clip. Sharpness is
measured over all prompts and seeds below, chosen by nobody: the steepest steps between neighbouring pixels as a share of
the contrast between shape and background. An edge within one pixel has 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from results_file import write_result
from torch.nn.functional import interpolate

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.model.latents import unnormalize
from ltx_batch.renderer import LtxRenderer

RESULT = Path(__file__).parent / "results" / "multi-scale.json"
PROMPTS = (
    "a red circle moves right over a dark background",
    "a blue triangle travels up on a white background",
    "a yellow square drifts left over a teal background",
    "a green star moves down on a grey background",
    "a pink circle flies up over sand",
    "an orange square slides right on a dark background",
)
SEEDS = range(200, 204)
PICTURED = ((1, 203), (1, 202), (2, 200), (5, 204))  # prompt and seed
SIZE, FRAMES, RATE_HZ = 256, 17, 16.0
CONFIG = "ltxv-2b-0.9.8-distilled"


def render(renderer: LtxRenderer, prompt: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first pass decoded and enlarged, and the finished clip: [F, 3, H, W] in 0..1 each."""
    request = RenderRequest(prompt=prompt, height=SIZE, width=SIZE, num_frames=FRAMES, frame_rate=RATE_HZ, seed=seed)
    found = renderer.trace(request)
    low = decode(renderer, found.first_pass)
    plain = interpolate(low, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return plain, found.frames[0].transpose(0, 1)


@torch.inference_mode()
def decode(renderer: LtxRenderer, latents: torch.Tensor) -> torch.Tensor:
    """[1, C, F, H, W] to [F, 3, 32H, 32W] in 0..1, without decode noise."""
    vae = renderer._pipeline.vae
    video = vae.decode(unnormalize(latents, vae), torch.tensor([0.05]), return_dict=False)[0]
    return (video[0] / 2 + 0.5).clamp(0, 1).transpose(0, 1)


def sharpness(frames: torch.Tensor) -> float:
    """Of [F, 3, H, W]: the 99.5th percentile of steps between neighbours, over the contrast of shape and background."""
    background = frames.flatten(2).median(-1).values[..., None, None]
    contrast = (frames - background).abs().amax((1, 2, 3))
    steps = [frames.mean(1).diff(dim=axis).abs().flatten(1) for axis in (1, 2)]
    return float((torch.cat(steps, 1).quantile(0.995, 1) / contrast).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("docs/images/multi-scale.png"))
    options = parser.parse_args()
    settings = {"precision": "fp32", "device": "cpu", "condition_preprocess": "none"}
    renderer = load_renderer("demo", pipeline_config=CONFIG, **settings)
    pairs = [render(renderer, PROMPTS[prompt], seed) for prompt, seed in PICTURED]
    rows = [torch.cat([clip[FRAMES // 2] for clip in pair], dim=2) for pair in pairs]
    pixels = (torch.cat(rows, dim=1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(options.picture, optimize=True)
    found = np.array(
        [[sharpness(clip) for clip in render(renderer, prompt, seed)] for prompt in PROMPTS for seed in SEEDS]
    )
    first, finished = found.mean(axis=0)
    figures = [
        {"name": "first_pass_enlarged", "value": round(first, 4), "unit": "step / contrast"},
        {"name": "multi_scale", "value": round(finished, 4), "unit": "step / contrast"},
        {"name": "ratio", "value": round(finished / first, 3), "unit": ""},
        {"name": "clips_sharper", "value": int((found[:, 1] > found[:, 0]).sum()), "unit": f"of {len(found)}"},
    ]
    write_result(RESULT, figures, notes=f"{len(PROMPTS)} prompts, {len(SEEDS)} seeds, {SIZE}x{SIZE}, {FRAMES} frames")


if __name__ == "__main__":
    main()
