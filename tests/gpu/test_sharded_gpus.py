"""Blocks dealt over two CUDA devices, on the tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.model.chunks import in_chunks
from tests.tiny_checkpoint import write_tiny_checkpoint

pytestmark = pytest.mark.gpus

CONFIG = """
stg_mode: attention_values
timesteps: [1.0, 0.975, 0.725]
guidance_scale: 3
stg_scale: 1
skip_block_list: [1, 4]
"""
REQUEST = RenderRequest(prompt="a red circle", height=96, width=160, num_frames=17, seed=7)


@pytest.mark.parametrize("precision", ["fp32", "int8", "bnb-int8"])
def test_sharded_blocks_compute_what_one_device_does(tmp_path: Path, precision: str) -> None:
    tiny = write_tiny_checkpoint(tmp_path, pipeline_config=CONFIG, transformer={"num_layers": 6})
    expected = load_renderer(str(tiny), precision=precision, device="cuda").render([REQUEST])[0]
    sharded = load_renderer(str(tiny), precision=precision, device="cuda", placement="sharded")
    for _ in range(2):
        clip = sharded.render([REQUEST])[0]
        assert clip.ran["placement"]["mode"] == "sharded"
        assert np.abs(clip.frames.astype(int) - expected.frames).max() <= 1
    with in_chunks(sharded._pipeline.transformer, 40):
        clip = sharded.render([REQUEST])[0]
    assert np.abs(clip.frames.astype(int) - expected.frames).max() <= 2
    homes = {parameter.device for parameter in sharded._pipeline.transformer.transformer_blocks.parameters()}
    assert homes == {torch.device("cuda", 0), torch.device("cuda", 1)}
