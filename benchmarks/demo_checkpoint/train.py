"""Train the demo checkpoint, slice by slice.

    python -m benchmarks.demo_checkpoint.train all                                   # every slice with its default time
    python -m benchmarks.demo_checkpoint.train vae --seconds 540 --work .demo
    python -m benchmarks.demo_checkpoint.train transformer --seconds 540
    torchrun --nproc-per-node 2 -m benchmarks.demo_checkpoint.train vae              # on two GPUs of one host
    python -m benchmarks.demo_checkpoint.train upsampler --seconds 60
    python -m benchmarks.demo_checkpoint.train export --out ltx_batch/checkpoints/demo

Only weights travel between slices (`--work`); clips and latents are drawn anew. A slice goes on from the weights it finds.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

from . import fit_transformer, fit_upsampler, fit_vae
from .export import export
from .loop import Stepper
from .tokens import load_tokenizer

SECONDS = {"vae": 400.0, "transformer": 1000.0, "upsampler": 60.0}
RATES = {"vae": (5e-4, 5e-6), "transformer": (1e-3, 1e-5), "upsampler": (1e-3, 1e-5)}  # 1e-3 is worse for the VAE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slice", choices=("vae", "transformer", "upsampler", "export", "all"))
    parser.add_argument("--seconds", type=float, help="time of the slice")
    parser.add_argument(
        "--work", type=Path, default=Path("out/demo_checkpoint"), help="where weights lie between slices"
    )
    parser.add_argument("--out", type=Path, default=Path("ltx_batch/checkpoints/demo"))
    parser.add_argument("--lr", type=float, help="learning rate at the start of the slice")
    parser.add_argument("--lr-end", type=float, help="learning rate at its end")
    parser.add_argument("--clips", type=int, default=30_000, help="clips of the commonest size in the latent cache")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    options = parser.parse_args()
    Stepper.captured = not options.eager
    warnings.filterwarnings("ignore")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    for name in ("vae", "transformer", "upsampler", "export") if options.slice == "all" else (options.slice,):
        run(name, options)


def run(name: str, options: argparse.Namespace) -> None:
    work, seconds = options.work, options.seconds or SECONDS.get(name, 0)
    lr, lr_end = RATES.get(name, (0.0, 0.0))
    rates = {"lr": options.lr or lr, "lr_end": options.lr_end or lr_end}
    vae = work / "vae.pt"
    match name:
        case "vae":
            fit_vae.fit(vae, seconds, **rates)
        case "transformer":
            tokenizer = load_tokenizer(work / "tokenizer")
            fit_transformer.fit(work / "transformer.pt", vae, tokenizer, seconds, clips=options.clips, **rates)
        case "upsampler":
            fit_upsampler.fit(work / "upsampler.pt", vae, seconds, clips=options.clips // 4, **rates)
        case "export":
            export(work, options.out)


if __name__ == "__main__":
    main()
