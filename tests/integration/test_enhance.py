"""Prompt enhancement with tiny random models that are real to transformers: what is asked, what is written, what stays."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ltx_batch.cli import main
from ltx_batch.enhance import Enhanced, EnhanceSpec, enhance
from ltx_batch.errors import CheckpointError, JobError, ManifestError
from ltx_batch.manifest import Manifest
from ltx_batch.model.enhance import FROM_PICTURE, FROM_TEXT, Answer, Captioner, Enhancer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
LONG = "a word " * 60
PICTURES = {
    "red": np.full((40, 40, 3), (255, 0, 0), np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with a chat template, one token a byte, that would sample if it were let."""
    folder = tmp_path_factory.mktemp("llm")
    vocabulary = {"<pad>": 0, "</s>": 1}
    vocabulary |= {letter: 2 + i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=258, eos_token_id=1, bos_token_id=None, pad_token_id=0, **sizes)
        )
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.5)
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioner")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "green", "a", "picture", "of"]
    (folder / "vocab.txt").write_text("\n".join(words))
    text = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sight |= {"image_size": 32, "patch_size": 16}
    pictures = BlipImageProcessor(size={"height": 32, "width": 32})
    BlipProcessor(pictures, BertTokenizerFast(str(folder / "vocab.txt"))).save_pretrained(folder)
    config = BlipConfig(text_config={**text, "encoder_hidden_size": 16}, vision_config=sight, projection_dim=16)
    for seed in range(50):
        random_captioner(config, seed).save_pretrained(folder)
        if len(set(map(Captioner(str(folder), "cpu", task=None).caption, PICTURES.values()))) == 2:
            return folder
    raise AssertionError("every captioner is blind")


def random_captioner(config: BlipConfig, seed: int) -> BlipForConditionalGeneration:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BlipForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.0)
    return model


def spec(llm: Path, **changes: Any) -> EnhanceSpec:
    return EnhanceSpec(llm=str(llm), **{"max_new_tokens": 12, "batch_size": 4, "device": "cpu", **changes})


def manifest(folder: Path, **columns: Sequence[Any]) -> str:
    path = folder / "rows.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


def alone(llm: Path, prompt: str, **changes: Any) -> Answer:
    """What the model says of one prompt by itself."""
    return Enhancer(str(llm), "cpu", max_new_tokens=changes.get("max_new_tokens", 12)).answer([prompt], [None])[0]


# what is written


def test_a_new_manifest_keeps_all_and_changes_short_prompts(llm: Path, tmp_path: Path) -> None:
    prompts = ["a red circle", LONG, "a blue square", "a red circle", ""]
    columns = {
        "shot": [1, 2, 3, 4, 5],
        "prompt": prompts,
        "seed": [7, None, 9, 7, 1],
        "note": [["a"], None, [], ["b"], None],
    }
    heard: list[tuple[int, int]] = []
    done = enhance(
        manifest(tmp_path, **columns),
        str(tmp_path / "new.parquet"),
        spec(llm),
        listen=lambda done, rows: heard.append((done, rows)),
    )
    assert done.fates == {"enhanced": 3, "long": 1, "invalid": 1} and heard == [(5, 5)]
    before, after = pq.read_table(tmp_path / "rows.parquet"), pq.read_table(tmp_path / "new.parquet")
    assert after.column_names == [*before.column_names, "original_prompt"]
    for name in ("shot", "seed", "note"):
        assert after.column(name).equals(before.column(name))
    new = after.column("prompt").to_pylist()
    assert (new[1], new[4]) == (LONG, "") and new[0] == new[3] != new[2]
    assert new[0] == alone(llm, "a red circle").text
    assert after.column("original_prompt").to_pylist() == ["a red circle", None, "a blue square", "a red circle", None]
    assert Manifest.open(str(tmp_path / "new.parquet")).rows == 5
    assert not (tmp_path / "new.parquet.parts").exists() or not list((tmp_path / "new.parquet.parts").rglob("*.json"))


def test_a_prompt_of_the_threshold_is_long_enough(llm: Path, tmp_path: Path) -> None:
    uri = manifest(tmp_path, prompt=["one two", "one two three", "one two three four"])
    done = enhance(uri, str(tmp_path / "new.parquet"), spec(llm, words_threshold=3))
    assert done.fates == {"enhanced": 1, "long": 2}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_text_manifests_stay_what_they_are(llm: Path, tmp_path: Path, kind: str) -> None:
    rows = [
        {"prompt": 'a "red", circle', "seed": 7, "note": "größer\nals"},
        {"prompt": LONG.strip(), "seed": 8, "note": "b"},
    ]
    source, target = tmp_path / f"rows.{kind}", tmp_path / f"new.{kind}"
    if kind == "csv":
        with source.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    enhance(str(source), str(target), spec(llm))
    found = Manifest.open(str(target))
    (shard,) = found.shards(10)
    written = found.read(shard).to_pylist()
    assert (
        written[0]["prompt"] == alone(llm, rows[0]["prompt"]).text
        and written[0]["original_prompt"] == 'a "red", circle'
    )
    assert written[1]["prompt"] == LONG.strip() and written[1]["original_prompt"] is None
    assert [(str(row["seed"]), row["note"]) for row in written] == [("7", "größer\nals"), ("8", "b")]


def test_files_of_one_manifest_become_one(llm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"prompt": ["a"], "seed": pa.array([1], pa.int32())}), folder / "a.parquet")
    pq.write_table(pa.table({"prompt": [LONG], "row_id": ["x"]}), folder / "b.parquet")
    enhance(str(folder), str(tmp_path / "new.parquet"), spec(llm))
    found = pq.read_table(tmp_path / "new.parquet").to_pylist()
    assert [(row["seed"], row["row_id"], row["original_prompt"]) for row in found] == [
        (1, None, "a"),
        (None, "x", None),
    ]


def test_what_would_spoil_the_manifest_is_refused(llm: Path, tmp_path: Path) -> None:
    uri = manifest(tmp_path, prompt=["a"], conditioning_media_paths=[["a.png"]], conditioning_start_frames=[[0]])
    with pytest.raises(JobError, match=r"give a file that ends in \.parquet"):
        enhance(uri, str(tmp_path / "new.csv"), spec(llm))
    with pytest.raises(JobError, match="must lie beside the manifest"):
        enhance(uri, str(tmp_path / "elsewhere" / "new.parquet"), spec(llm))
    (tmp_path / "there.parquet").touch()
    with pytest.raises(JobError, match="is there already"):
        enhance(uri, str(tmp_path / "there.parquet"), spec(llm))
    again = manifest(tmp_path, prompt=["a"], original_prompt=["b"])
    with pytest.raises(JobError, match="was enhanced before"):
        enhance(again, str(tmp_path / "new.parquet"), spec(llm))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\nno JSON\n')
    with pytest.raises(ManifestError, match="is not JSON"):
        enhance(str(tmp_path / "rows.jsonl"), str(tmp_path / "new.jsonl"), spec(llm))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "rows.parquet", "there.parquet"]


# the model


def test_an_answer_is_greedy_and_the_same_in_a_batch(llm: Path) -> None:
    """Left-padded rows of other lengths do not change it, nor does the sampling that the model's own settings ask for."""
    enhancer = Enhancer(str(llm), "cpu", max_new_tokens=12)
    prompts = ["a red circle moves right over a dark background", "a", "a blue square"]
    together = enhancer.answer(prompts, [None] * 3)
    assert together == [enhancer.answer([prompt], [None])[0] for prompt in prompts]
    assert len({answer.text for answer in together}) == 3


def test_an_answer_that_is_cut_is_told_from_one_that_ends(llm: Path) -> None:
    enhancer = Enhancer(str(llm), "cpu", max_new_tokens=12)
    cut = enhancer.answer(["a red circle"], [None])[0]
    assert cut.cut and len(cut.text) > 4
    letter = next(letter for letter in cut.text[1:] if letter.isascii() and letter.isalnum())
    ends = [1, enhancer._tokenizer.convert_tokens_to_ids(letter)]  # what it writes in the middle is now the end
    enhancer._model.generation_config.eos_token_id = ends
    ended = enhancer.answer(["a red circle"], [None])[0]
    assert not ended.cut and ended.text == cut.text[: cut.text.index(letter, 1) + 1]


def test_what_is_asked_holds_system_prompt_idea_and_caption(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enhancer = Enhancer(str(llm), "cpu", max_new_tokens=2)
    asked: list[str] = []
    generate = enhancer._model.generate

    def listen(**inputs: Any) -> torch.Tensor:
        asked.extend(enhancer._tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True))
        return generate(**inputs)

    monkeypatch.setattr(enhancer._model, "generate", listen)
    enhancer.answer(["a red circle", "it moves"], [None, "a blue square"])
    assert asked[0] == f"[system]{FROM_TEXT}\n[user]user_prompt: a red circle\n[assistant]"
    assert asked[1] == f"[system]{FROM_PICTURE}\n[user]user_prompt: it moves\nimage_caption: a blue square\n[assistant]"


def test_a_model_without_chat_template_is_refused(llm: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    fast = PreTrainedTokenizerFast.from_pretrained(llm)
    fast.chat_template = None
    fast.save_pretrained(bare)
    with pytest.raises(CheckpointError, match="has no chat template: enhancing takes an instruct model"):
        Enhancer(str(bare), "cpu", max_new_tokens=2)
    with pytest.raises(CheckpointError, match="cannot be loaded with transformers' AutoTokenizer"):
        Enhancer("nobody/nothing", "cpu", max_new_tokens=2)


# pictures


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """Rows: text alone, a first frame, the same first frame with another idea, a later frame, two frames."""
    for name, pixels in PICTURES.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    paths = [None, ["red.png"], ["noise.png"], ["red.png"], ["red.png", "noise.png"]]
    starts = [None, [0], [0], [8], [0, 8]]
    return manifest(tmp_path, prompt=["it moves"] * 5, conditioning_media_paths=paths, conditioning_start_frames=starts)


def test_rows_with_pictures_stay_as_they_are_without_a_captioner(llm: Path, pictures: str, tmp_path: Path) -> None:
    assert enhance(pictures, str(tmp_path / "new.parquet"), spec(llm)).fates == {"enhanced": 1, "media": 4}


def test_a_first_frame_is_captioned_and_the_caption_told(
    llm: Path, captioner: Path, pictures: str, tmp_path: Path
) -> None:
    done = enhance(pictures, str(tmp_path / "new.parquet"), spec(llm, captioner=str(captioner)))
    assert done.fates == {"enhanced": 3, "media": 2}
    new = pq.read_table(tmp_path / "new.parquet").column("prompt").to_pylist()
    describe = Captioner(str(captioner), "cpu", task=None)
    captions = [describe.caption(pixels) for pixels in PICTURES.values()]
    assert captions[0] != captions[1]
    enhancer = Enhancer(str(llm), "cpu", max_new_tokens=12)
    assert new[:3] == [answer.text for answer in enhancer.answer(["it moves"] * 3, [None, *captions])]
    assert new[3:] == ["it moves"] * 2


def test_a_bad_picture_is_told_of_and_stops_no_other_row(llm: Path, captioner: Path, tmp_path: Path) -> None:
    """The row stays as it is. Mended, it is done by the same command, and rows of sound parts are not done again."""
    for name, pixels in PICTURES.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    good = (tmp_path / "noise.png").read_bytes()
    (tmp_path / "noise.png").write_bytes(good[: len(good) // 2])
    Image.fromarray(PICTURES["red"][:1, :1]).save(tmp_path / "dot.png")
    text = [f"idea {index}" for index in range(64)]
    paths = [None] * 64 + [["red.png"], ["noise.png"], ["gone.png"], ["dot.png"], None]
    uri = manifest(
        tmp_path,
        prompt=[*text, *["it moves"] * 4, ""],
        row_id=[f"r{index}" for index in range(69)],
        conditioning_media_paths=paths,
        conditioning_start_frames=[path and [0] for path in paths],
    )
    settings, new = spec(llm, captioner=str(captioner), max_new_tokens=2, batch_size=64), tmp_path / "new.parquet"
    done = enhance(uri, str(new), settings)
    places = {(error.file, error.row, error.row_id, error.column, str(error.value)) for error in done.errors}
    column = "conditioning_media_paths"
    assert places >= {
        (uri, 65, "r65", column, "['noise.png']"),
        (uri, 66, "r66", column, "['gone.png']"),
        (uri, 68, "r68", "prompt", ""),
    }
    rules = {error.row: error.rule for error in done.errors}
    assert "noise.png: the image cannot be read" in rules[65] and "gone.png does not exist" in rules[66]
    assert done.fates["invalid"] == len(done.errors) and done.fates["enhanced"] == 69 - len(done.errors)
    written = pq.read_table(new).to_pylist()
    assert all((row["original_prompt"] is None) == (index in rules) for index, row in enumerate(written))

    (tmp_path / "noise.png").write_bytes(good)
    (tmp_path / "gone.png").write_bytes(good)
    new.unlink()
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "new.parquet.parts").rglob("*.json")}
    assert len(parts) == 1, "the part without a bad row"
    again = enhance(uri, str(new), settings)
    assert again.fates["enhanced"] == done.fates["enhanced"] + 2
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "new.parquet.parts").rglob("*.json")} == parts


def test_a_picture_that_the_captioner_cannot_take_is_a_bad_row(
    llm: Path, captioner: Path, pictures: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caption = Captioner.caption

    def picky(self: Captioner, picture: Any) -> str:
        if np.array_equal(
            picture, PICTURES["noise"]
        ):  # as Qwen2-VL's processor says of a picture 200 times as long as wide
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return caption(self, picture)

    monkeypatch.setattr(Captioner, "caption", picky)
    done = enhance(pictures, str(tmp_path / "new.parquet"), spec(llm, captioner=str(captioner)))
    assert [(error.row, error.column) for error in done.errors] == [(2, "conditioning_media_paths")]
    assert f"{captioner} cannot describe it: absolute aspect ratio" in done.errors[0].rule


def test_lines_that_are_no_rows_are_all_told_before_any_work(llm: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"idea {index}"}) for index in range(80)]
    lines[3], lines[70] = "no JSON", "[]"
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(ManifestError) as caught:
        enhance(str(tmp_path / "rows.jsonl"), str(tmp_path / "new.jsonl"), spec(llm))
    assert [issue.row for issue in caught.value.issues] == [3, 70]
    assert not list(tmp_path.rglob("*.json"))


# going on


def test_the_same_command_goes_on_where_it_was_cut_short(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = manifest(tmp_path, prompt=[f"idea {index}" for index in range(150)])
    asked: list[str] = []
    answer = Enhancer.answer

    def interrupted(enhancer: Enhancer, prompts: Sequence[str], captions: Any) -> list[Answer]:
        if len(asked) >= 100 and broken:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return answer(enhancer, prompts, captions)

    monkeypatch.setattr(Enhancer, "answer", interrupted)
    broken, settings = [True], spec(llm, max_new_tokens=2, batch_size=10)
    with pytest.raises(KeyboardInterrupt):
        enhance(uri, str(tmp_path / "new.parquet"), settings)
    assert not (tmp_path / "new.parquet").exists() and len(asked) == 104
    broken.clear()
    done = enhance(uri, str(tmp_path / "new.parquet"), settings)
    assert done.fates == {"enhanced": 150} and len(done.cut) == 150
    assert asked[104:] == [f"idea {index}" for index in range(64, 150)], "the first part is not asked again"
    enhance(uri, str(tmp_path / "other.parquet"), spec(llm, max_new_tokens=3, batch_size=10))
    assert len(asked) == 104 + 86 + 150, "parts made in another way are no parts of this"


def test_the_verb_tells_what_it_did(llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uri, new = manifest(tmp_path, prompt=["a red circle", LONG]), str(tmp_path / "new.parquet")
    words = ["enhance", uri, "-o", new, "--llm", str(llm), "--max-new-tokens", "5", "--device", "cpu"]
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out.splitlines()[-1])
    assert (told["rows"], told["enhanced"], told["long"], told["cut"]) == (2, 1, 1, [{"file": uri, "row": 0}])
    assert f"{uri} row 0: the answer was cut; give it more --max-new-tokens" in err
    assert main(words) == 2 and "is there already" in capsys.readouterr().err
    bad = [words[0], manifest(tmp_path, prompt=["", "a red circle"]), *words[2:]]
    (tmp_path / "new.parquet").unlink()
    assert main([*bad, "--json"]) == 1
    out, err = capsys.readouterr()
    (error,) = json.loads(out.splitlines()[-1])["errors"]
    assert (error["row"], error["column"], error["value"]) == (0, "prompt", "") and error["rule"]
    assert f"error: {uri} row 0, prompt = ''" in err and "1 stay as they are: they are bad" in err
    assert isinstance(Enhanced(2, {}).as_dict()["empty"], int)
