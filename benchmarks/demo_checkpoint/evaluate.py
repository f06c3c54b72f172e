"""Judge a checkpoint by the pixels of what it renders: does a clip show what its prompt says?

    python -m benchmarks.demo_checkpoint.evaluate [--checkpoint demo] [--precision fp32] [--clips 512] [--json FILE]

Clips of attribute combinations that training never drew, and three phrasings that it never wrote, are rendered through
`load_renderer` and read by `reader`. Beside them stand the reader's own score on drawn clips and on the autoencoder's
reconstructions, the autoencoder's PSNR with the background alone for comparison, and how well a first frame comes back.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo
from numpy.typing import NDArray

from ltx_batch import Condition, RenderRequest, load_renderer
from ltx_batch.renderer import LtxRenderer, resolve_checkpoint

from . import captions, draw, world
from .reader import Reading, read

HEIGHT, WIDTH, NUM_FRAMES = 128, 128, 17
ATTRIBUTES = ("colour", "background", "direction", "shape")
BATCH = 16
# Nobody trained these: other sentence shapes, words that the captions have but never in this order.
PHRASINGS = (
    "There goes a {colour} {shape}, and it goes {way}; behind it all is {background}.",
    "{background} everywhere. In front of it the {shape} heads {way}, and the {shape} is {colour}",
    "I would like to see how one {colour} {shape} on {background} makes its way {way}, please",
)
_SIMPLE_WAY = {name: name.replace("-", " and ") for name in world.DIRECTIONS}


@dataclass(frozen=True)
class Case:
    """A prompt and what a clip of it must show."""

    prompt: str
    expected: dict[str, str]
    seed: int


def held_out_cases(count: int, seed: int = 0) -> list[Case]:
    """Captions as in training, of combinations that training held out; background always said."""
    rng = random.Random(seed)
    numbers = [number for number in range(_total()) if world.is_held_out(number)]
    cases = []
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


def score(readings: Iterable[Reading], expected: Iterable[dict[str, str]]) -> dict[str, float]:
    """Share of clips that show the right value, by attribute."""
    hits = [
        [getattr(reading, name) == truth[name] for name in ATTRIBUTES]
        for reading, truth in zip(readings, expected, strict=True)
    ]
    return dict(zip(ATTRIBUTES, np.mean(hits, axis=0).round(4).tolist(), strict=True))


def render_cases(renderer: LtxRenderer, cases: Sequence[Case]) -> Iterator[NDArray[np.uint8]]:
    """Frames of each case, in order."""
    rng = random.Random(2)
    for start in range(0, len(cases), BATCH):
        frame_rate = round(rng.uniform(*world.FRAME_RATES_HZ), 2)
        requests = [
            RenderRequest(
                prompt=case.prompt,
                height=HEIGHT,
                width=WIDTH,
                num_frames=NUM_FRAMES,
                frame_rate=frame_rate,
                seed=case.seed,
            )
            for case in cases[start : start + BATCH]
        ]
        yield from (clip.frames for clip in renderer.render(requests))


def judge_prompts(renderer: LtxRenderer, cases: Sequence[Case], sheet: Path | None = None) -> dict[str, float]:
    frames = list(render_cases(renderer, cases))
    if sheet is not None:
        draw.contact_sheet(frames[:16], sheet)
    return score(map(read, frames), (case.expected for case in cases))


def judge_autoencoder(checkpoint: str, count: int) -> dict[str, dict[str, float]]:
    """The reader on drawn clips and on reconstructions, and PSNR in dB of reconstructions and of the background alone."""
    drawn, rebuilt, plain, expected = [], [], [], []
    folder = Path(resolve_checkpoint(checkpoint))
    vae = AutoencoderKLLTXVideo.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32).eval()
    for clips, scenes in _drawn_clips(count):
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
        "reader_on_drawn": score(map(read, drawn), expected),
        "reader_on_reconstructions": score(map(read, rebuilt), expected),
        "psnr_db": {
            "reconstruction": round(float(np.mean(fidelity)), 2),
            "least": round(float(np.min(fidelity)), 2),
            "background_only": round(float(np.mean(plain)), 2),
        },
    }


def judge_first_frame(renderer: LtxRenderer, count: int) -> dict[str, float]:
    """PSNR in dB of the rendered first frame against the drawn one that it was given."""
    found = []
    for clips, scenes in _drawn_clips(count):
        stills = draw.to_uint8(clips[:, :, :1]).numpy()
        rng = random.Random(3)
        requests = [
            RenderRequest(
                prompt=captions.caption(world.combination_names(number), rng),
                height=HEIGHT,
                width=WIDTH,
                num_frames=NUM_FRAMES,
                frame_rate=16.0,
                seed=index,
                conditions=(Condition(still),),
            )
            for index, (number, still) in enumerate(zip(scenes.combination.tolist(), stills, strict=True))
        ]
        frames = (clip.frames[0] for clip in renderer.render(requests))
        found += [psnr_db(_pixels(a), _pixels(b[0])) for a, b in zip(frames, stills, strict=True)]
    return {"mean": round(float(np.mean(found)), 2), "least": round(float(np.min(found)), 2)}


def psnr_db(first: torch.Tensor, second: torch.Tensor) -> float:
    """Of two tensors in -1..1."""
    return float(10 * torch.log10(4 / (first - second).square().mean().clamp(min=1e-10)))


def _pixels(frames: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(frames).float() / 127.5 - 1


def _drawn_clips(count: int) -> Iterator[tuple[torch.Tensor, world.Scenes]]:
    generator = torch.Generator().manual_seed(7)
    for start in range(0, count, BATCH):
        size = min(BATCH, count - start)
        scenes = world.sample_scenes(size, HEIGHT, WIDTH, NUM_FRAMES, held_out=True, generator=generator)
        yield draw.draw(scenes)[0], scenes


def _background(clip: torch.Tensor) -> torch.Tensor:
    """The clip without its shape: each row of pixels at its median over time and width."""
    rows = clip.transpose(1, 2).flatten(2).median(dim=2).values
    return rows.view(3, 1, -1, 1).expand_as(clip)


def _expected(names: captions.Names) -> dict[str, str]:
    shape, colour, direction, background = names[:4]
    return {"colour": colour, "background": background, "direction": direction, "shape": shape}


def _total() -> int:
    return int(np.prod(world.COUNTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clips", type=int, default=512, help="held-out clips; the phrasings get 192, the rest 96")
    parser.add_argument("--json", type=Path, help="write the table here, e.g. benchmarks/results/demo-checkpoint.json")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet of the first clips here")
    options = parser.parse_args()
    renderer = load_renderer(options.checkpoint, precision=options.precision, device=options.device)
    table = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python -m benchmarks.demo_checkpoint.evaluate --checkpoint {options.checkpoint} "
        f"--precision {options.precision} --clips {options.clips}",
        "device": renderer.device,
        "precision": renderer.precision,
        "size": [HEIGHT, WIDTH, NUM_FRAMES],
        "held_out_combinations": {"clips": options.clips}
        | judge_prompts(renderer, held_out_cases(options.clips), options.sheet),
        "unseen_phrasings": {"clips": 192} | judge_prompts(renderer, unseen_phrasing_cases(192)),
        **judge_autoencoder(options.checkpoint, 96),
        "first_frame_psnr_db": judge_first_frame(renderer, 96),
    }
    text = json.dumps(table, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
