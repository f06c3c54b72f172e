"""Judge a checkpoint by the pixels of what it renders: does a clip show what its prompt says?

    python -m benchmarks.demo_checkpoint.evaluate [--checkpoint demo] [--precision fp32] [--clips 512] [--json FILE]

Clips of attribute combinations that training never drew, and three phrasings that it never wrote, are rendered through
`load_renderer` and read by `reader`. Beside them stand the reader's own score on drawn clips and on the autoencoder's
reconstructions, the autoencoder's PSNR by size with that of the background alone, and how well a first frame comes back:
against the picture, and against what the autoencoder was given of it once it had been pre-processed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo
from numpy.typing import NDArray

from ltx_batch import Condition, RenderRequest, load_renderer
from ltx_batch.renderer import LtxRenderer, resolve_checkpoint
from ltx_batch.request import Prepared

from . import captions, draw, world
from .nets import DISTILLED_SIGMAS
from .reader import Reading, read

NUM_FRAMES = 17
MAIN = (128, 128)
SIZES = (MAIN, (64, 64), (160, 160), (160, 96), (96, 160), (160, 256), (256, 160), (256, 256), (192, 320), (320, 320))
ATTRIBUTES = ("colour", "background", "direction", "shape", "whole")
BATCH = 16
# Nobody trained these: other sentence shapes, words that the captions have but never in this order.
PHRASINGS = (
    "There goes a {colour} {shape}, and it goes {way}; behind it all is {background}.",
    "{background} everywhere. In front of it the {shape} heads {way}, and the {shape} is {colour}",
    "I would like to see how one {colour} {shape} on {background} makes its way {way}, please",
)
_SIMPLE_WAY = {name: name.replace("-", " and ") for name in world.DIRECTIONS}


Size = tuple[int, int]  # height, width
Expected = dict[str, str | bool]  # by attribute
Schedule = dict[str, Any]  # fields of a RenderRequest
DISTILLED: Schedule = {"timesteps": DISTILLED_SIGMAS, "guidance_scale": 1.0}  # as the official distilled models run


@dataclass(frozen=True)
class Case:
    """A prompt and what a clip of it must show."""

    prompt: str
    expected: Expected
    seed: int


def held_out_cases(count: int, seed: int = 0) -> list[Case]:
    """Captions as in training, of combinations that training held out; background always said."""
    rng = random.Random(seed)
    numbers = [number for number in range(_total()) if world.is_held_out(number)]
    cases: list[Case] = []
    while len(cases) < count:
        names = world.combination_names(rng.choice(numbers))
        prompt = captions.caption(names, rng)
        if any(word in prompt.lower() for word in captions.BACKGROUND_WORDS[names[3]]):
            cases.append(Case(prompt, _expected(names), seed=1000 + len(cases)))
    return cases


def unseen_phrasing_cases(count: int, seed: int = 1) -> list[Case]:
    """The three phrasings in turn, over held-out combinations."""
    rng = random.Random(seed)
    numbers = [number for number in range(_total()) if world.is_held_out(number)]
    cases = []
    for index in range(count):
        names = world.combination_names(rng.choice(numbers))
        shape, colour, direction, background = names[:4]
        words = {"shape": shape, "colour": colour, "way": _SIMPLE_WAY[direction], "background": background}
        cases.append(Case(PHRASINGS[index % len(PHRASINGS)].format(**words), _expected(names), seed=5000 + index))
    return cases


def score(readings: Iterable[Reading], expected: Iterable[Expected]) -> dict[str, float]:
    """Share of the clips that show the right value, by attribute."""
    hits = [
        [getattr(reading, name) == truth[name] for name in ATTRIBUTES]
        for reading, truth in zip(readings, expected, strict=True)
    ]
    return dict(zip(ATTRIBUTES, np.mean(hits, axis=0).round(4).tolist(), strict=True))


def render_cases(
    renderer: LtxRenderer,
    cases: Sequence[Case],
    size: Size = MAIN,
    schedule: Schedule | None = None,
    *,
    batch: int = BATCH,
) -> Iterator[NDArray[np.uint8]]:
    """Frames of each case, in order, with the checkpoint's own schedule and guidance where no others are given. Each
    `batch` has a frame rate of its own."""
    rng = random.Random(2)
    for start in range(0, len(cases), batch):
        frame_rate = round(rng.uniform(*world.FRAME_RATES_HZ), 2)
        requests = [
            _request(case.prompt, size, frame_rate=frame_rate, seed=case.seed, **(schedule or {}))
            for case in cases[start : start + batch]
        ]
        yield from (clip.frames for clip in renderer.render(requests))


def judge_prompts(
    renderer: LtxRenderer,
    cases: Sequence[Case],
    size: Size = MAIN,
    *,
    schedule: Schedule | None = None,
    sheet: Path | None = None,
) -> dict[str, float]:
    """Share of clips that show what their prompt says, by attribute."""
    frames = list(render_cases(renderer, cases, size, schedule))
    if sheet is not None:
        draw.contact_sheet(frames[:16], sheet)
    return {"clips": len(cases)} | score(map(read, frames), (case.expected for case in cases))


def judge_autoencoder(checkpoint: str, count: int, size: Size = MAIN) -> dict[str, Any]:
    """The reader on drawn clips and on reconstructions, and PSNR in dB of reconstructions and of the background alone."""
    drawn, rebuilt, plain, expected = [], [], [], []
    folder = Path(resolve_checkpoint(checkpoint))
    vae = AutoencoderKLLTXVideo.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32).eval()
    for clips, scenes in _drawn_clips(count, size):
        with torch.inference_mode():
            latents = vae.encode(clips).latent_dist.mean
            timestep = torch.full((len(clips),), 0.05)
            decoded = vae.decode(latents, timestep, return_dict=False)[0].clamp(-1, 1)
        drawn += list(draw.to_uint8(clips).numpy())
        rebuilt += list(draw.to_uint8(decoded).numpy())
        plain += [psnr_db(_background(clip), clip) for clip in clips]
        expected += [_expected(world.combination_names(number)) for number in scenes.combination.tolist()]
    fidelity = [psnr_db(_pixels(a), _pixels(b)) for a, b in zip(rebuilt, drawn, strict=True)]
    return {
        "clips": count,
        "reader_on_drawn": score(map(read, drawn), expected),
        "reader_on_reconstructions": score(map(read, rebuilt), expected),
        "psnr_db": _summary(fidelity),
        "background_only_psnr_db": _summary(plain),
    }


def judge_first_frame(renderer: LtxRenderer, count: int) -> dict[str, Any]:
    """PSNR in dB of the rendered first frame against the picture, and against what the autoencoder was given of it."""
    to_picture, to_given = [], []
    rng = random.Random(3)
    for clips, scenes in _drawn_clips(count):
        stills = draw.to_uint8(clips[:, :, :1]).numpy()
        texts = [captions.caption(world.combination_names(number), rng) for number in scenes.combination.tolist()]
        requests = [
            renderer.prepare(_request(text, MAIN, frame_rate=16.0, seed=index, conditions=(Condition(still),)))
            for index, (text, still) in enumerate(zip(texts, stills, strict=True))
        ]
        for clip, request, still in zip(renderer.render(requests), requests, stills, strict=True):
            first, given = _pixels(clip.frames[0]), request.conditions[0].media
            assert isinstance(given, Prepared)  # fp32 [F, 3, H, W] in -1..1, of the clip's own size
            to_picture.append(psnr_db(first, _pixels(still[0])))
            to_given.append(psnr_db(first, torch.from_numpy(given.frames[0]).movedim(0, -1)))
    return {"clips": count, "to_picture": _summary(to_picture), "to_tensor_given_to_vae": _summary(to_given)}


def _request(prompt: str, size: Size, **values: Any) -> RenderRequest:
    return RenderRequest(prompt=prompt, height=size[0], width=size[1], num_frames=NUM_FRAMES, **values)


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(values)), 2), "least": round(float(np.min(values)), 2)}


def psnr_db(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of two tensors in -1..1."""
    return float(10 * torch.log10(4 / (first - second).square().mean().clamp(min=1e-10)))


def _pixels(frames: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(frames).float() / 127.5 - 1


def _drawn_clips(count: int, size: Size = MAIN) -> Iterator[tuple[torch.Tensor, world.Scenes]]:
    generator = torch.Generator().manual_seed(7)
    for start in range(0, count, BATCH):
        rows = min(BATCH, count - start)
        scenes = world.sample_scenes(rows, *size, NUM_FRAMES, held_out=True, generator=generator)
        yield draw.draw(scenes)[0], scenes


def _background(clip: torch.Tensor) -> torch.Tensor:
    """The clip without its shape: each row of pixels at its median over time and width."""
    rows = clip.transpose(1, 2).flatten(2).median(dim=2).values
    return rows.view(3, 1, -1, 1).expand_as(clip)


def _expected(names: captions.Names) -> Expected:
    shape, colour, direction, background = names[:4]
    return {"colour": colour, "background": background, "direction": direction, "shape": shape, "whole": True}


def _total() -> int:
    return int(np.prod(world.COUNTS))


def table(
    renderer: LtxRenderer, official: LtxRenderer, checkpoint: str, count: int, sheet: Path | None
) -> dict[str, Any]:
    """All figures; `count` clips of held-out combinations, and of the rest what makes their order clear.

    `official` is the same checkpoint with the official pre-processing of pictures.
    """
    few = max(1, count // 16)
    return {
        "held_out_combinations": judge_prompts(renderer, held_out_cases(count), sheet=sheet),
        "held_out_combinations_as_distilled": judge_prompts(renderer, held_out_cases(count), schedule=DISTILLED),
        "unseen_phrasings": judge_prompts(renderer, unseen_phrasing_cases(count // 2)),
        "held_out_combinations_by_size": {
            _name(size): judge_prompts(renderer, held_out_cases(few, seed=index), size)
            for index, size in enumerate(SIZES[1:], 2)
        },
        "autoencoder": judge_autoencoder(checkpoint, count // 4),
        "autoencoder_by_size": {_name(size): judge_autoencoder(checkpoint, few, size) for size in SIZES[1:]},
        "first_frame_psnr_db": judge_first_frame(renderer, count // 4),
        "first_frame_psnr_db_official_preprocess": judge_first_frame(official, count // 8),
    }


def _name(size: Size) -> str:
    return f"{size[0]}x{size[1]}x{NUM_FRAMES}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clips", type=int, default=512, help="held-out clips; the other figures get a part of it")
    parser.add_argument("--json", type=Path, help="write the table here, e.g. benchmarks/results/demo-checkpoint.json")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first clips here")
    options = parser.parse_args()
    load = partial(load_renderer, options.checkpoint, precision=options.precision, device=options.device)
    renderer, official = load(), load(condition_preprocess="official")
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python -m benchmarks.demo_checkpoint.evaluate --checkpoint {options.checkpoint} "
        f"--precision {options.precision} --clips {options.clips}",
        "device": renderer.device,
        "precision": renderer.precision,
        "size": _name(MAIN),
        **table(renderer, official, options.checkpoint, options.clips, options.sheet),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
