"""Blocks dealt over two CUDA devices, on the tiny checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.model import placement
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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "bnb-int8"])
def test_sharded_blocks_compute_what_one_device_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    # By what is free they would all go to the second GPU: the first holds a context, which is more than this model.
    monkeypatch.setattr(placement, "_deal", lambda sizes, left: [2, 4])
    tiny = write_tiny_checkpoint(tmp_path, pipeline_config=CONFIG, transformer={"num_layers": 6})
    kept, sharded = (
        load_renderer(str(tiny), placement=how, precision=precision, attention="native", device="cuda")
        for how in ("offload", "sharded")
    )
    expected = kept.render([REQUEST])[0].frames_sha256()
    for _ in range(2):
        clip = sharded.render([REQUEST])[0]
        assert clip.ran["placement"]["mode"] == "sharded"
        assert clip.frames_sha256() == expected
    frames = []
    for renderer in (kept, sharded):
        with in_chunks(renderer._pipeline.transformer, 40):
            frames.append(renderer.render([REQUEST])[0].frames_sha256())
    assert frames[0] == frames[1]
    homes = {parameter.device for parameter in sharded._pipeline.transformer.transformer_blocks.parameters()}
    assert homes == {torch.device("cuda", 0), torch.device("cuda", 1)}
