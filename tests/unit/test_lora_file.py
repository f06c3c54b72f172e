"""What a LoRA file holds and whether it fits, by its header alone; and the cache that workers keep."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_files import (
    COMFYUI,
    DIFFUSERS,
    KOHYA,
    OFFICIAL,
    OLD_DIFFUSERS,
    PEFT_STATE,
    PLAIN,
    random_pairs,
    write_lora,
)
from safetensors.numpy import save_file

from ltx_batch.errors import LoraError
from ltx_batch.lora import LoraCache, diffusers_name, open_lora, parse_lora_file, shapes_in
from ltx_batch.request import LoraRef
from ltx_batch.tensor_file import read_tensor_file

TO_Q, TO_OUT = "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.attn2.to_out.0"
SHAPES = {TO_Q: (8, 8), TO_OUT: (8, 12), "proj_in": (8, 4), "time_embed.linear": (48, 8)}


def refusal(path: Path) -> str:
    """Said alike of the file and of its bytes."""
    with pytest.raises(LoraError) as caught:
        open_lora(str(path))
    assert str(path) in str(caught.value)
    with pytest.raises(LoraError) as again:
        parse_lora_file(path.read_bytes(), str(path))
    assert str(again.value).partition(", which begin")[0] == str(caught.value).partition(", which begin")[0]
    return str(caught.value)


def tensors(**named: tuple[int, ...]) -> dict[str, Any]:
    return {name: np.zeros(shape, np.float32) for name, shape in named.items()}


# names


@pytest.mark.parametrize("naming", [DIFFUSERS, PLAIN, COMFYUI, KOHYA, OFFICIAL, OLD_DIFFUSERS, PEFT_STATE])
def test_every_naming_gives_diffusers_names(tmp_path: Path, naming: tuple[str, str]) -> None:
    file = open_lora(str(write_lora(tmp_path / "a.safetensors", random_pairs(SHAPES), naming)))
    assert {name: (layer.out_features, layer.in_features) for name, layer in file.layers.items()} == SHAPES
    assert {(layer.rank, layer.scale, layer.alpha) for layer in file.layers.values()} == {(3, 1.0, None)}
    assert file.layers["proj_in"].down.startswith(naming[0].partition("{")[0])
    assert file.misfits(SHAPES) == []


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ("model.diffusion_model.patchify_proj", "proj_in"),
        ("diffusion_model.adaln_single.emb.timestep_embedder.linear_1", "time_embed.emb.timestep_embedder.linear_1"),
        ("transformer_blocks.3.attn1.q_norm", "transformer_blocks.3.attn1.norm_q"),
        ("transformer.transformer_blocks.3.ff.net.0.proj", "transformer_blocks.3.ff.net.0.proj"),
        ("caption_projection.linear_1", "caption_projection.linear_1"),
        ("my_adaln_single", "my_adaln_single"),
    ],
)
def test_official_names_become_diffusers_names(other: str, name: str) -> None:
    assert diffusers_name(other) == name


def test_a_models_linear_layers_are_read_from_its_header(tmp_path: Path) -> None:
    weights = {
        "model.diffusion_model.patchify_proj.weight": (8, 4),
        "model.diffusion_model.patchify_proj.bias": (8,),
        "model.diffusion_model.transformer_blocks.0.attn1.q_norm.weight": (8,),
        "model.diffusion_model.scale_shift_table": (2, 8),
        "vae.decoder.up.weight": (3, 3),
    }
    path = tmp_path / "model.safetensors"
    save_file({name: np.zeros(shape, np.float32) for name, shape in weights.items()}, path)
    assert shapes_in(read_tensor_file(path)) == {"proj_in": (8, 4)}


# how strong


def metadata(prefix: str, **values: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"{prefix}{name}": value for name, value in values.items()})}


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize(
    ("values", "to_q", "to_out"),
    [
        ({"r": 3, "lora_alpha": 6}, 2.0, 2.0),
        ({"r": 3, "lora_alpha": 6, "use_rslora": True}, 6 / 3**0.5, 6 / 3**0.5),
        ({"r": 3, "lora_alpha": 6, "alpha_pattern": {TO_Q: 12}}, 4.0, 2.0),
        ({"r": 3, "lora_alpha": 6, "alpha_pattern": {f"^{TO_Q}": 12, "to_out.0": 1.5}}, 4.0, 0.5),
        ({"r": 8, "lora_alpha": 6, "rank_pattern": {TO_Q: 3, TO_OUT: 3}}, 2.0, 2.0),
        ({"r": 3}, 1.0, 1.0),
    ],
)
def test_alpha_and_its_patterns_come_from_the_metadata(
    tmp_path: Path, prefix: str, values: dict[str, Any], to_q: float, to_out: float
) -> None:
    told = metadata(prefix, **values)
    layers = open_lora(str(write_lora(tmp_path / "a.safetensors", random_pairs(SHAPES), metadata=told))).layers
    assert (layers[TO_Q].scale, layers[TO_OUT].scale) == (to_q, to_out)


def test_alpha_tensors_are_found_beside_their_pair(tmp_path: Path) -> None:
    layers = open_lora(str(write_lora(tmp_path / "a.safetensors", random_pairs(SHAPES), KOHYA, alpha=6))).layers
    assert layers["proj_in"].alpha == "diffusion_model.patchify_proj.alpha"


@pytest.mark.parametrize("text", ["{", "[]", '{"lora_alpha": "much"}', '{"alpha_pattern": {"(": 1}}'])
def test_metadata_that_cannot_be_understood_is_not_passed_over(tmp_path: Path, text: str) -> None:
    told = {"lora_adapter_metadata": text}
    message = refusal(write_lora(tmp_path / "a.safetensors", random_pairs(SHAPES), metadata=told))
    assert "lora_adapter_metadata cannot be understood" in message


# what is refused


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"text_encoder.encoder.block.0.q.lora_A.weight": (3, 8)}, "a LoRA for a text encoder"),
        ({"text_encoders.t5xxl.transformer.q.lora_up.weight": (8, 3)}, "a LoRA for a text encoder"),
        ({"lora_te1_text_model_q.lora_down.weight": (3, 8)}, "a LoRA for a text encoder"),
        ({f"diffusion_model.{TO_Q}.dora_scale": (8,)}, "it is a DoRA"),
        ({f"transformer.{TO_Q}.lora_magnitude_vector": (8,)}, "it is a DoRA"),
        ({f"diffusion_model.{TO_Q}.lokr_w1": (2, 2)}, "it is a LoKr or LoHa"),
        ({f"transformer.{TO_Q}.lora_B.bias": (8,)}, "it is a LoRA with biases"),
        ({f"base_model.model.{TO_Q}.lora_A.weight": (3, 8)}, "save it by diffusers' save_lora_weights"),
        ({"transformer.norm.diff": (8,)}, "tensors that belong to no pair"),
        ({f"{TO_Q}.lora_down.weight": (3, 8)}, "or to one that is there already"),
        ({f"transformer.{TO_OUT}.lora_A.weight": (3, 8)}, f"only one of the two matrices: {TO_OUT}"),
    ],
)
def test_what_is_more_than_a_lora_of_the_transformer_is_refused(
    tmp_path: Path, held: dict[str, tuple[int, ...]], message: str
) -> None:
    good = tensors(**{f"transformer.{TO_Q}.lora_A.weight": (3, 8), f"transformer.{TO_Q}.lora_B.weight": (8, 3)})
    save_file({**good, **tensors(**held)}, tmp_path / "a.safetensors")
    assert message in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("down", "up", "message"),
    [
        ((3, 8), (8, 4), f"not [rank, in] and [out, rank]: {TO_Q} has [3, 8] and [8, 4]"),
        ((3, 8, 1, 1), (8, 3, 1, 1), f"{TO_Q} has [3, 8, 1, 1] and [8, 3, 1, 1]"),
        ((0, 8), (8, 0), f"{TO_Q} has [0, 8] and [8, 0]"),
    ],
)
def test_matrices_that_are_no_pair_are_named(tmp_path: Path, down: Any, up: Any, message: str) -> None:
    held = tensors(**{f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up})
    save_file(held, tmp_path / "a.safetensors")
    assert message in refusal(tmp_path / "a.safetensors")


def test_all_faults_of_a_file_come_at_once(tmp_path: Path) -> None:
    held = tensors(
        **{f"{TO_Q}.lora_A.weight": (3, 8), f"{TO_Q}.lora_B.weight": (8, 4), f"{TO_Q}.alpha": (2,)},
        **{f"{TO_OUT}.lora_A.weight": (3, 8)},
    )
    save_file(held, tmp_path / "a.safetensors")
    message = refusal(tmp_path / "a.safetensors")
    assert all(part in message for part in ("only one", "not [rank, in]", "not one number"))


@pytest.mark.parametrize(
    "name", ["ltxv-097-ic-lora-depth-control.safetensors", "IC_LoRA.safetensors", "iclora.safetensors"]
)
def test_an_in_context_lora_is_known_by_its_name(tmp_path: Path, name: str) -> None:
    assert "in-context LoRA" in refusal(write_lora(tmp_path / name, random_pairs(SHAPES)))
    assert open_lora(str(write_lora(tmp_path / "epic-lora.safetensors", random_pairs(SHAPES)))).layers


def test_an_in_context_lora_is_known_by_its_metadata(tmp_path: Path) -> None:
    told = {"reference_downscale_factor": "2"}
    message = refusal(write_lora(tmp_path / "a.safetensors", random_pairs(SHAPES), metadata=told))
    assert "in-context LoRA (metadata reference_downscale_factor)" in message


@pytest.mark.parametrize("data", [b"", b"PK\3\4 a pickle", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"])
def test_a_file_that_is_no_safetensors_says_so(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(LoraError, match=r"not a \.safetensors file"):
        open_lora(str(tmp_path / "a.safetensors"))
    with pytest.raises(LoraError, match=r"not a \.safetensors file"):
        parse_lora_file(data, "a.safetensors")


def test_a_file_without_a_pair_says_what_it_holds(tmp_path: Path) -> None:
    save_file(tensors(**{"encoder.weight": (8, 8), "encoder.bias": (8,)}), tmp_path / "a.safetensors")
    assert "is no LoRA: it holds encoder.bias, encoder.weight" in refusal(tmp_path / "a.safetensors")


def test_a_torn_file_is_told_by_its_length(tmp_path: Path) -> None:
    whole = write_lora(tmp_path / "a.safetensors", random_pairs(SHAPES)).read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-4])
    assert f"is torn: it holds {len(whole) - 4} bytes and its header speaks of {len(whole)}" in refusal(
        tmp_path / "a.safetensors"
    )


def test_tensors_of_eight_bits_are_refused(tmp_path: Path) -> None:
    shapes = {f"{TO_Q}.lora_A.weight": [3, 8], f"{TO_Q}.lora_B.weight": [8, 3]}
    entries = {
        name: {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [24 * place, 24 * place + 24]}
        for place, (name, shape) in enumerate(shapes.items())
    }
    header = json.dumps(entries).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(48))
    assert f"tensors that are none of F32, F16, BF16, F64: {TO_Q}.lora_A.weight" in refusal(tmp_path / "a.safetensors")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match=r"^there is no file .*gone\.safetensors$"):
        open_lora(str(tmp_path / "gone.safetensors"))


def test_misfits_name_layers_and_sizes(tmp_path: Path) -> None:
    pairs = random_pairs({TO_Q: (8, 8), TO_OUT: (16, 12), "audio.to_q": (8, 8), "audio.to_k": (8, 8)})
    absent, other = open_lora(str(write_lora(tmp_path / "a.safetensors", pairs))).misfits(SHAPES)
    assert absent.startswith("2 of its 4 layers are no linear layers of this transformer: audio.to_")
    assert f"it has e.g. {TO_Q}" in absent
    assert other == f"1 of its 4 layers have another size: {TO_OUT} is 12 to 16 in the file and 12 to 8 in the model"


# the cache


def ref(path: Path) -> LoraRef:
    return LoraRef(str(path), 0.5, hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_file_is_fetched_once_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"first")
    cache, wanted = LoraCache(), ref(path)
    found = cache.fetch(wanted)
    assert (found, found.data) == (wanted, b"first")
    path.unlink()
    assert cache.fetch(LoraRef("elsewhere", 1.0, wanted.sha256)).data == b"first"
    path.write_bytes(b"second")
    with pytest.raises(LoraError, match=f"has sha256 {ref(path).sha256}, not {wanted.sha256}: it changed"):
        LoraCache().fetch(wanted)


def test_a_file_that_nobody_hashed_is_read_each_time(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.safetensors", LoraCache()
    for data in (b"first", b"second"):
        path.write_bytes(data)
        assert cache.fetch(LoraRef(path)).data == data
        assert cache.fetch(LoraRef(path)).sha256 == hashlib.sha256(data).hexdigest()


def test_the_cache_is_bounded_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 10)
    a, b, c = map(ref, paths)
    cache = LoraCache(limit_bytes=20)
    for lora in (a, b, a, c):
        cache.fetch(lora)
    for path in paths:
        path.unlink()
    assert cache.held_bytes == 20
    assert (cache.fetch(a).data, cache.fetch(c).data) == (b"a" * 10, b"c" * 10)
    with pytest.raises(LoraError, match="there is no file"):
        cache.fetch(b)


def test_a_file_above_the_bound_is_held_while_it_is_the_newest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * 30)
    cache = LoraCache(limit_bytes=20)
    assert len(cache.fetch(ref(tmp_path / "a")).data or b"") == cache.held_bytes == 30


def test_threads_share_one_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ltx_batch.lora.cache as module

    (tmp_path / "a").write_bytes(b"a")
    reads, read = [], module.read_uri
    monkeypatch.setattr(module, "read_uri", lambda *arguments: (reads.append(1), read(*arguments))[1])
    cache, wanted = LoraCache(), ref(tmp_path / "a")
    threads = [threading.Thread(target=cache.fetch, args=(wanted,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1 and cache.fetch(wanted).data == b"a"
