"""Write the trained weights as a checkpoint folder in the layout of diffusers' LTX pipelines, in bf16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .fit_vae import load_vae
from .loop import load
from .nets import GUIDANCE_SCALE, SIGMAS, make_text_encoder, make_transformer, make_upsampler

MODEL_INDEX = {
    "_class_name": "LTXConditionPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "LTXVideoTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLLTXVideo"],
}
PIPELINE_CONFIG = f"""\
# The demo's own schedule, under the names of the official files (LTX-Video, configs/ltxv-2b-0.9.8-distilled.yaml).
pipeline_type: base
timesteps: {list(SIGMAS)}
guidance_scale: {GUIDANCE_SCALE}
stg_scale: 0
rescaling_scale: 1
decode_timestep: 0.05
decode_noise_scale: 0.025
precision: bfloat16
sampler: from_checkpoint
stochastic_sampling: false
"""


def export(work: Path, out: Path) -> None:
    """Raises FileNotFoundError where a slice has not been trained yet."""
    cpu = torch.device("cpu")
    transformer, text_encoder, upsampler = make_transformer(), make_text_encoder(), make_upsampler()
    for path, modules in (
        (work / "transformer.pt", {"transformer": transformer, "text_encoder": text_encoder}),
        (work / "upsampler.pt", {"upsampler": upsampler}),
    ):
        if not load(path, **modules):
            raise FileNotFoundError(f"{path}: train that slice first")
    vae = load_vae(work / "vae.pt", cpu)
    shutil.rmtree(out, ignore_errors=True)
    parts = {"vae": vae, "transformer": transformer, "text_encoder": text_encoder, "latent_upsampler": upsampler}
    for name, module in parts.items():
        module.to(torch.bfloat16).save_pretrained(out / name, safe_serialization=True)
    shutil.copytree(work / "tokenizer", out / "tokenizer")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False, shift_terminal=None)
    scheduler.save_pretrained(out / "scheduler")
    (out / "model_index.json").write_text(json.dumps(MODEL_INDEX, indent=2) + "\n")
    (out / "pipeline_config.yaml").write_text(PIPELINE_CONFIG)
    for file in sorted(out.rglob("*")):
        if file.is_file():
            print(f"{file.relative_to(out)!s:<50} {file.stat().st_size:>10,} bytes")
    total = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{total / 1e6:.2f} MB in all")
