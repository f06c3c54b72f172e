"""Official lists of VAE blocks against the configurations that diffusers publishes for the same releases.

Lists: Lightricks/LTX-Video, utils/diffusers_config_mapping.py (0.9.0), and ComfyUI, ldm/lightricks/vae (0.9.1, 0.9.5).
Configurations: huggingface/diffusers, scripts/convert_ltx_to_diffusers.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from ltx_batch.model.vae_blocks import group_decoder, group_encoder


def res(layers: int, **values: Any) -> list[Any]:
    return ["res_x", {"num_layers": layers, **values}]


WIDEN = ["compress_all", {"residual": True, "multiplier": 2}]
OLD = [
    ["res_x", 4],
    ["compress_all", 1],
    ["res_x_y", 1],
    ["res_x", 3],
    ["compress_all", 1],
    ["res_x_y", 1],
    ["res_x", 3],
    ["compress_all", 1],
    ["res_x", 3],
    ["res_x", 4],
]
NEW_ENCODER = [
    res(4),
    ["compress_space_res", {"multiplier": 2}],
    res(6),
    ["compress_time_res", {"multiplier": 2}],
    res(6),
    ["compress_all_res", {"multiplier": 2}],
    res(2),
    ["compress_all_res", {"multiplier": 2}],
    res(2),
]
NEW_DECODER = [res(5, inject_noise=False), WIDEN, res(5), WIDEN, res(5), WIDEN, res(5)]
NOISY_DECODER = [res(n, inject_noise=noisy) for n, noisy in ((5, True), (6, True), (7, True), (8, False))]
NOISY_DECODER = [NOISY_DECODER[0], WIDEN, NOISY_DECODER[1], WIDEN, NOISY_DECODER[2], WIDEN, NOISY_DECODER[3]]


def test_the_old_encoder() -> None:
    found = group_encoder(OLD, 128)
    assert found.config == {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("LTXVideoDownBlock3D",) * 4,
        "downsample_type": ("conv",) * 4,
        "spatio_temporal_scaling": (True, True, True, False),
        "layers_per_block": (4, 3, 3, 3, 4),
    }
    assert found.modules["encoder.down_blocks.5"] == "encoder.down_blocks.1.conv_out"
    assert found.modules["encoder.down_blocks.7"] == "encoder.down_blocks.2.downsamplers.0"
    assert found.modules["encoder.down_blocks.9"] == "encoder.mid_block"
    assert found.strides == (8, 8)


def test_the_encoder_since_0_9_5() -> None:
    found = group_encoder(NEW_ENCODER, 128)
    assert found.config == {
        "block_out_channels": (128, 256, 512, 1024, 2048),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "spatio_temporal_scaling": (True,) * 4,
        "layers_per_block": (4, 6, 6, 2, 2),
    }
    assert found.modules["encoder.down_blocks.5"] == "encoder.down_blocks.2.downsamplers.0"
    assert found.strides == (8, 8)


@pytest.mark.parametrize(
    ("blocks", "timesteps", "config"),
    [
        (
            OLD,
            False,
            {
                "decoder_block_out_channels": (128, 256, 512, 512),
                "decoder_layers_per_block": (4, 3, 3, 3, 4),
                "decoder_inject_noise": (False,) * 5,
                "decoder_spatio_temporal_scaling": (True, True, True, False),
                "upsample_residual": (False,) * 4,
                "upsample_factor": (1,) * 4,
            },
        ),
        (
            NOISY_DECODER,
            True,
            {
                "decoder_block_out_channels": (256, 512, 1024),
                "decoder_layers_per_block": (5, 6, 7, 8),
                "decoder_inject_noise": (True, True, True, False),
                "decoder_spatio_temporal_scaling": (True,) * 3,
                "upsample_residual": (True,) * 3,
                "upsample_factor": (2,) * 3,
            },
        ),
        (
            NEW_DECODER,
            True,
            {
                "decoder_block_out_channels": (256, 512, 1024),
                "decoder_layers_per_block": (5, 5, 5, 5),
                "decoder_inject_noise": (False,) * 4,
                "decoder_spatio_temporal_scaling": (True,) * 3,
                "upsample_residual": (True,) * 3,
                "upsample_factor": (2,) * 3,
            },
        ),
    ],
    ids=["0.9.0", "0.9.1", "0.9.5"],
)
def test_decoders(blocks: list[Any], timesteps: bool, config: dict[str, Any]) -> None:
    found = group_decoder(blocks, 128, timestep_conditioning=timesteps)
    assert found.config == config
    assert found.strides == (8, 8)
    assert found.unused == ()
    assert found.modules["decoder.up_blocks.0"] == "decoder.mid_block"


def test_the_old_decoders_modules_are_told_by_their_kind() -> None:
    modules = group_decoder(OLD, 128, timestep_conditioning=False).modules
    assert [modules[f"decoder.up_blocks.{place}"].removeprefix("decoder.up_blocks.") for place in range(1, 10)] == [
        "0",
        "1.upsamplers.0",
        "1",
        "2.conv_in",
        "2.upsamplers.0",
        "2",
        "3.conv_in",
        "3.upsamplers.0",
        "3",
    ]


def test_a_group_without_layers_takes_no_timestep() -> None:
    found = group_decoder([res(1), WIDEN, WIDEN, res(1)], 8, timestep_conditioning=True)
    assert found.config["decoder_layers_per_block"] == (1, 0, 1)
    assert found.unused == ("decoder.up_blocks.0.time_embedder",)


ENCODERS_THAT_CANNOT_BE = {
    "wider compress_all": ([res(1), ["compress_all", {"multiplier": 2}], res(1)], "this change of width is not known"),
    "res_x_y after folding": ([["compress_all_res", 1], ["res_x_y", 1], res(1)], "change of width is not known"),
    "a late change": (
        [["compress_all", 1], res(1), ["res_x_y", 1], res(1)],
        "the last group of blocks changes the width",
    ),
    "compress_time": ([["compress_time", 1], res(1)], "block compress_time is not known here; known are res_x"),
    "a number": ([7], "a block is a name and its values, found 7"),
    "nothing": ([], "no blocks that change the size"),
}
DECODERS_THAT_CANNOT_BE = {
    "res_x_y with timesteps": ([res(1), ["compress_all", 1], ["res_x_y", 1], res(1), res(1)], "only without timesteps"),
    "compress_space": ([res(1), ["compress_space", 1], res(1)], "block compress_space is not known here"),
}


@pytest.mark.parametrize("fault", ENCODERS_THAT_CANNOT_BE)
def test_encoders_that_diffusers_has_not(fault: str) -> None:
    blocks, message = ENCODERS_THAT_CANNOT_BE[fault]
    with pytest.raises(ValueError, match=message):
        group_encoder(blocks, 8)


@pytest.mark.parametrize("fault", DECODERS_THAT_CANNOT_BE)
def test_decoders_that_diffusers_has_not(fault: str) -> None:
    blocks, message = DECODERS_THAT_CANNOT_BE[fault]
    with pytest.raises(ValueError, match=message):
        group_decoder(blocks, 8, timestep_conditioning=True)
