"""Whether `decode_noise_scale` is a remedy for blocks in clips of int8: the demo and its outlier twin, against fp32.

    python benchmarks/decode_noise.py [--clips 24]

The decoder is given its latents with so much noise mixed in, and the timestep 0.05 at all times. Blocks would show as steps
at the borders of latents, every 32 pixels: `blocks` is the mean step between neighbouring pixels there over the mean step
elsewhere, 1 where no border can be seen. PSNR is that of an int8 clip against the fp32 clip of the same noise scale.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.demo_checkpoint.evaluate import held_out_cases  # noqa: E402
from benchmarks.outlier_twin import write_twin  # noqa: E402
from benchmarks.results_file import write_result  # noqa: E402
from ltx_batch import RenderRequest, load_renderer  # noqa: E402
from ltx_batch.renderer import LtxRenderer, resolve_checkpoint  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "decode-noise.json"
SCALES = (0.0, 0.025, 0.05, 0.1)
LATENT = 32  # pixels


def render(renderer: LtxRenderer, prompts: list[str], scale: float) -> np.ndarray:
    """fp32 [clips, F, H, W, 3] in 0..1."""
    requests = [
        RenderRequest(
            prompt=prompt, height=128, width=128, num_frames=17, frame_rate=16.0, seed=seed, decode_noise_scale=scale
        )
        for seed, prompt in enumerate(prompts)
    ]
    return np.stack([clip.frames for clip in renderer.render(requests)]).astype(np.float32) / 255


def blocks(clips: np.ndarray) -> float:
    """The mean step across borders of latents over the mean step elsewhere."""
    across = [np.abs(np.diff(clips, axis=axis)).swapaxes(axis, 0) for axis in (2, 3)]
    border = np.concatenate([steps[LATENT - 1 :: LATENT].ravel() for steps in across])
    inside = np.concatenate([np.delete(steps, np.s_[LATENT - 1 :: LATENT], axis=0).ravel() for steps in across])
    return float(border.mean() / inside.mean())


def psnr(clips: np.ndarray, reference: np.ndarray) -> float:
    """Mean over clips, dB; equal clips count as 100."""
    errors = ((clips - reference) ** 2).mean(axis=(1, 2, 3, 4))
    return float(np.minimum(100, -10 * np.log10(np.maximum(errors, 1e-10))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prompts = [case.prompt for case in held_out_cases(options.clips)]
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {"demo": resolve_checkpoint("demo"), "twin": str(write_twin(Path(folder, "twin")))}
        for name, checkpoint in checkpoints.items():
            clips = {}
            for precision in ("fp32", "int8"):
                renderer = load_renderer(checkpoint, precision=precision, device="cpu")
                clips[precision] = {scale: render(renderer, prompts, scale) for scale in SCALES}
                renderer.close()
            for precision, found in clips.items():
                figures += [
                    {
                        "name": f"{name}_{precision}_blocks_{scale:g}",
                        "value": round(blocks(found[scale]), 4),
                        "unit": "x",
                    }
                    for scale in SCALES
                ]
            for scale in SCALES:
                value = round(psnr(clips["int8"][scale], clips["fp32"][scale]), 2)
                figures.append({"name": f"{name}_int8_psnr_{scale:g}", "value": value, "unit": "dB"})
    write_result(RESULT, figures, notes=f"{options.clips} held-out captions, 128x128, 17 frames, 8 steps")


if __name__ == "__main__":
    main()
