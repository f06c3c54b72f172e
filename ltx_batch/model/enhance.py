"""Prompt enhancement: an instruct model that turns a short idea into the kind of prompt LTX-Video was trained on.

As LTX-Video does it (ltx_video/utils/prompt_enhance_utils.py): a system prompt, `user_prompt: ...` and, for a clip that
begins with a picture, `image_caption: ...`; at most 256 new tokens. The system prompts are our own, decoding is greedy, and a
batch is padded on the left, as a model that writes on to the right needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ltx_batch.errors import CheckpointError
from ltx_batch.model.device import pick_device

_RULES = (
    "You turn a short idea for a video into a prompt for a video model. Answer with one paragraph of plain English, 150 "
    "words at most, and with nothing else: no title, no list, no remark of your own. {begin} Then go through what happens, "
    "in order, with every movement and gesture; say how people and things look, what surrounds them, where the camera is "
    "and how it moves, the light and the colours, and whatever changes suddenly. Be literal and exact, as in a list of "
    "shots. Keep to what the idea means; add only what a viewer would see."
)
FROM_TEXT = _RULES.format(begin="Begin with the main action, in one sentence.")
FROM_PICTURE = _RULES.format(
    begin="The video begins with a picture, of which you are given a caption. Begin with what the picture shows; where idea "
    "and caption disagree, the caption is right. Then tell the main action."
)
_CAPTION_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Answer:
    """An enhanced prompt on one line; `cut`: the model was stopped before it had finished."""

    text: str
    cut: bool


class Enhancer:
    """An instruct model and its tokenizer, by folder or hub id. Raises CheckpointError where they cannot be loaded."""

    def __init__(self, name: str, device: str, *, max_new_tokens: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._device, self._max_new_tokens = pick_device(device), max_new_tokens
        self._tokenizer = _load(AutoTokenizer, name)
        self._tokenizer.padding_side = "left"
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if self._tokenizer.chat_template is None:
            raise CheckpointError(f"{name} has no chat template: enhancing takes an instruct model")
        self._model = _load(AutoModelForCausalLM, name, dtype=_dtype(self._device)).eval().to(self._device)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[str], captions: Sequence[str | None]) -> list[Answer]:
        """An answer for each prompt, in one batch. A caption is of the picture that the clip begins with."""
        chats = [_chat(prompt, caption) for prompt, caption in zip(prompts, captions, strict=True)]
        asked = self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(self._device)
        written = self._model.generate(
            **asked,
            max_new_tokens=self._max_new_tokens,
            pad_token_id=self._tokenizer.pad_token_id,
            **_GREEDY,
        )[:, asked["input_ids"].shape[1] :]
        texts = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        return [Answer(" ".join(text.split()), self._is_cut(row)) for text, row in zip(texts, written, strict=True)]

    def _is_cut(self, row: torch.Tensor) -> bool:
        ends = self._model.generation_config.eos_token_id
        ends = torch.tensor([ends] if isinstance(ends, int) else ends or [], device=row.device)
        return len(row) == self._max_new_tokens and not bool(torch.isin(row, ends).any())


class Captioner:
    """Any image-to-text model that transformers knows, by folder or hub id; none that brings code of its own.

    `task` is the text that some models want beside the picture, such as Florence-2's `<DETAILED_CAPTION>`.
    """

    def __init__(self, name: str, device: str, *, task: str | None) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._device, self._task = pick_device(device), task
        self._processor = _load(AutoProcessor, name)
        self._model = _load(AutoModelForImageTextToText, name, dtype=_dtype(self._device)).eval().to(self._device)

    @torch.inference_mode()
    def caption(self, picture: NDArray[np.uint8]) -> str:
        """`picture` is uint8 [H, W, 3]."""
        from PIL import Image

        task = {} if self._task is None else {"text": self._task}
        asked = self._processor(images=Image.fromarray(picture), return_tensors="pt", **task)
        asked = asked.to(self._device, _dtype(self._device))
        written = self._model.generate(**asked, max_new_tokens=_CAPTION_TOKENS, **_GREEDY)
        text: str = self._processor.batch_decode(written, skip_special_tokens=True)[0]
        return " ".join(text.removeprefix(self._task or "").split())


# A model's own generation config may ask for sampling, with settings that greedy decoding warns of.
_GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


def _chat(prompt: str, caption: str | None) -> list[dict[str, str]]:
    asked = f"user_prompt: {prompt}" if caption is None else f"user_prompt: {prompt}\nimage_caption: {caption}"
    system = FROM_TEXT if caption is None else FROM_PICTURE
    return [{"role": "system", "content": system}, {"role": "user", "content": asked}]


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _load(kind: Any, name: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{name} cannot be loaded with transformers' {kind.__name__}: {reason}") from error
