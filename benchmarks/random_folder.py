"""Checkpoint folders of a real size with random weights, in diffusers' layout, to load as any other.

    python benchmarks/random_folder.py FOLDER --model 13b --precision int8

With a quantised precision no weight of the transformer is ever on the disk in 16 bits: it is made on the device, rounded layer
by layer, and written. The text encoder is one small layer, so that a prompt costs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import T5Config, T5EncoderModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.random_model import byte_tokenizer, make, random_parts  # noqa: E402
from ltx_batch.model.device import pick_device  # noqa: E402
from ltx_batch.model.quantize.policy import Precision, precision  # noqa: E402
from ltx_batch.model.quantize.saved import WEIGHTS, save_model, write_tensors  # noqa: E402
from ltx_batch.model.quantize.swap import quantize_model  # noqa: E402

_SMALL_T5 = {"vocab_size": 384, "d_kv": 64, "d_ff": 1024, "num_layers": 1, "num_heads": 8}


def write_folder(folder: Path, name: str, policy: Precision, device: torch.device) -> Path:
    """`name` as of `random_parts`. The folder's pipeline config is the official base default: a job names its own."""
    dtype = getattr(torch, policy.dtype)
    parts = random_parts(name, dtype, device)
    transformer = parts.transformer
    quantize_model(transformer, policy, device)
    if policy.quantize is None:
        _write_model(transformer, folder / "transformer")
    else:
        config = json.loads(transformer.to_json_string())
        save_model(transformer, config, policy, folder / "transformer", {"random": "0" * 64})
    _write_model(parts.vae, folder / "vae")
    _write_model(parts.latent_upsampler, folder / "latent_upsampler")
    text = T5Config(d_model=transformer.config.caption_channels, feed_forward_proj="gated-gelu", **_SMALL_T5)
    encoder = make(lambda: T5EncoderModel(text), dtype, torch.device("cpu"))
    encoder.set_input_embeddings(encoder.shared)  # one matrix, as in the real one
    encoder.save_pretrained(folder / "text_encoder")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False).save_pretrained(folder / "scheduler")
    return folder


def _write_model(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(model.to_json_string())
    tensors = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(tensors, folder / WEIGHTS, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="13b", choices=["13b", "2b", "tiny"])
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--hadamard-group", type=int, default=None)
    parser.add_argument("--keep-blocks", type=int, default=None)
    options = parser.parse_args()
    device = pick_device("auto")
    policy = precision(
        options.precision, device.type, hadamard_group=options.hadamard_group, keep_blocks=options.keep_blocks
    )
    write_folder(options.folder, options.model, policy, device)


if __name__ == "__main__":
    main()
