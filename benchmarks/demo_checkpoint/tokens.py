"""Train the demo checkpoint's tokenizer: a Unigram model with byte fallback, so that no text gives `<unk>`."""

from __future__ import annotations

import json
import math
import pydoc
import random
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from . import captions, world
from .loop import rank, wait
from .nets import VOCABULARY

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as in T5
MAX_LENGTH = 256


# Standard-library modules whose documentation is long, plain prose.
_DOCUMENTED = (
    "argparse", "calendar", "collections", "configparser", "contextlib", "csv", "datetime", "decimal", "difflib",
    "email", "fractions", "functools", "gettext", "heapq", "html", "http", "inspect", "json", "locale", "logging",
    "mailbox", "optparse", "os", "pathlib", "pickle", "platform", "plistlib", "pprint", "queue", "random", "shutil",
    "statistics", "string", "subprocess", "tempfile", "textwrap", "threading", "timeit", "turtle", "typing", "unittest",
    "urllib", "uuid", "warnings", "wave", "zipfile",
)  # fmt: skip


def general_english() -> list[str]:
    """Prose that every Python installation has: the documentation of its standard library."""
    found = (pydoc.locate(module) for module in _DOCUMENTED)
    return [line for module in found for line in (pydoc.getdoc(module) or "").splitlines()]


def train_tokenizer(caption_count: int = 40_000, seed: int = 0) -> Tokenizer:
    """A lower-casing Unigram tokenizer that ends each text with `</s>`; every word of the captions is one piece."""
    rng, total = random.Random(seed), math.prod(world.COUNTS)
    texts = [captions.caption(world.combination_names(rng.randrange(total)), rng) for _ in range(caption_count)]
    pieces = dict.fromkeys(SPECIAL, 0.0) | _words(texts)
    bytes_needed = [f"<0x{value:02X}>" for value in range(256)]
    room = VOCABULARY - len(pieces) - len(bytes_needed)
    learned = _learn(general_english() + texts[: len(texts) // 20])
    pieces |= dict([(piece, score) for piece, score in learned if piece not in pieces][:room])
    floor = min(pieces.values()) - 10
    pieces |= dict.fromkeys(bytes_needed, floor)
    tokenizer = _bare(Tokenizer(models.Unigram(list(pieces.items()), unk_id=2, byte_fallback=True)))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def _words(texts: list[str]) -> dict[str, float]:
    """Words with the logarithm of their frequency, the commonest first."""
    splitter = _bare(Tokenizer(models.Unigram())).pre_tokenizer
    counts = Counter(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text.lower()))
    return {piece: math.log(count / counts.total()) for piece, count in counts.most_common()}


def _learn(texts: list[str]) -> list[tuple[str, float]]:
    learner = _bare(Tokenizer(models.Unigram()))
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    return [(piece, score) for piece, score in json.loads(learner.to_str())["model"]["vocab"]]


def _bare(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """Trained where it is not there yet, and kept with the weights: its ids must not change between slices."""
    file = folder / "tokenizer.json"
    if not file.exists() and rank() == 0:
        save_tokenizer(train_tokenizer(), folder)
    wait()
    return Tokenizer.from_file(str(file))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the configuration that `AutoTokenizer.from_pretrained` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
