"""Captions for the demo world: many wordings of the same six attributes, and a pool of them as token ids."""

from __future__ import annotations

import math
import random

import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import world

Names = tuple[str, str, str, str, str, str]  # shape, colour, direction, background, size, speed
MAX_TOKENS = (
    40  # nearly no training caption is longer; at inference prompts are padded to 256, which the mask makes equal
)

SHAPE_WORDS = {
    "circle": ("circle", "circle", "circle", "disc", "disk", "ball", "round shape"),
    "square": ("square", "square", "square", "box"),
    "triangle": ("triangle", "triangle", "triangle", "triangular shape"),
    "star": ("star", "star", "star", "five-pointed star"),
}
COLOUR_WORDS = {
    "red": ("red", "red", "red", "bright red"),
    "orange": ("orange",),
    "yellow": ("yellow", "yellow", "bright yellow"),
    "green": ("green", "green", "bright green"),
    "cyan": ("cyan", "cyan", "turquoise"),
    "blue": ("blue", "blue", "bright blue"),
    "purple": ("purple", "purple", "violet"),
    "pink": ("pink",),
}
BACKGROUND_WORDS = {
    "dark": ("dark", "dark", "black"),
    "white": ("white", "white", "plain white"),
    "grey": ("grey", "gray"),
    "sand": ("sand", "sandy", "beige"),
    "teal": ("teal", "dark teal"),
}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
SPEED_WORDS = {
    "slow": ("slowly", "slowly", "gently", "at a slow pace", "without hurry"),
    "fast": ("fast", "quickly", "rapidly", "at high speed", "in a hurry"),
}
# base form, -ing form; the plain verbs go with any speed
VERBS = (
    ("move", "moving"), ("move", "moving"), ("travel", "travelling"), ("slide", "sliding"), ("glide", "gliding"),
    ("go", "going"), ("float", "floating"), ("fly", "flying"), ("head", "heading"), ("sail", "sailing"),
    ("shift", "shifting"), ("pass", "passing"), ("wander", "wandering"), ("roll", "rolling"), ("drift", "drifting"),
    ("run", "running"), ("swim", "swimming"), ("march", "marching"), ("cruise", "cruising"), ("walk", "walking"),
    ("journey", "journeying"), ("proceed", "proceeding"), ("advance", "advancing"), ("make its way", "making its way"),
)  # fmt: skip
SPEED_VERBS = {
    "slow": (("creep", "creeping"), ("crawl", "crawling"), ("inch", "inching"), ("stroll", "strolling")),
    "fast": (("dash", "dashing"), ("rush", "rushing"), ("race", "racing"), ("zoom", "zooming"), ("shoot", "shooting")),
}
_OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
_EDGE = {"left": "left", "right": "right", "up": "top", "down": "bottom"}
_CORNER = {"up": "upper", "down": "lower"}
OPENINGS = (
    "", "", "", "", "a video of", "a clip of", "an animation of", "footage of", "we see", "there is", "show", "look at",
    "a short film with", "picture", "a scene with", "imagine", "this is", "here comes",
)  # fmt: skip
BACKGROUND_NOUNS = (
    "background", "background", "background", "backdrop", "surface", "scene", "wall", "canvas", "floor", "field",
)  # fmt: skip
PREPOSITIONS = ("over", "on", "across", "against", "in front of", "above", "along", "upon", "before")


def caption(names: Names, rng: random.Random) -> str:
    """One random wording. Shape, colour and direction are always said; background, size and speed nearly always."""
    shape, colour, direction, background, size, speed = names
    say_size, say_speed = rng.random() < 0.6, rng.random() < 0.6
    subject = _subject(shape, colour, size if say_size else None, rng)
    verb, adverb = _verb(speed if say_speed else None, rng)
    way = _direction(direction, rng)
    place = _place(background, rng) if rng.random() < 0.92 else ""
    text = _sentence(subject, verb, adverb, way, place, rng)
    text = " ".join(text.split()).replace(" ,", ",").replace(" .", ".").strip(" ,")
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.3 else "")


def _subject(shape: str, colour: str, size: str | None, rng: random.Random) -> str:
    noun, hue = rng.choice(SHAPE_WORDS[shape]), rng.choice(COLOUR_WORDS[colour])
    big = rng.choice(SIZE_WORDS[size]) if size else ""
    article = rng.choice(("a", "a", "a", "the", "one", "this", "some", "a single", ""))
    forms = (
        f"{article} {big} {hue} {noun}",
        f"{article} {big} {hue} {noun}",
        f"{article} {hue} {big} {noun}",
        f"{article} {big} {noun} that is {hue}",
        f"{article} {big} {noun} in {hue}",
        f"{article} {big} {noun} of {hue} colour",
        f"{article} {big} {hue} coloured {noun}",
        f"{article} {noun}, {big} {hue},",
        f"{article} {hue} {noun} which is {big}" if big else f"{article} {hue} {noun}",
        f"{article} {big} {noun} painted {hue}",
        f"something {hue} and {big}, {article} {noun}," if big else f"something {hue}, {article} {noun},",
    )
    return rng.choice(forms)


def _verb(speed: str | None, rng: random.Random) -> tuple[tuple[str, str], str]:
    if speed is None:
        return rng.choice(VERBS), ""
    if rng.random() < 0.4:
        return rng.choice(SPEED_VERBS[speed]), ""
    return rng.choice(VERBS), rng.choice(SPEED_WORDS[speed])


def _direction(direction: str, rng: random.Random) -> str:
    parts = direction.split("-")
    return _straight(parts[0], rng) if len(parts) == 1 else _diagonal(parts[0], parts[1], rng)


def _straight(way: str, rng: random.Random) -> str:
    edge, opposite = _EDGE[way], _EDGE[_OPPOSITE[way]]
    forms = [
        way, way, way, f"{way}ward", f"{way}wards", f"towards the {edge}", f"to the {edge}", f"toward the {edge} edge",
        f"from {opposite} to {edge}", f"from the {opposite} to the {edge}", f"straight {way}", f"in the {way} direction",
        f"to the {edge} side", f"further {way}", f"in direction {way}",
    ]  # fmt: skip
    return rng.choice(forms)


def _diagonal(vertical: str, horizontal: str, rng: random.Random) -> str:
    edge, corner = _EDGE[vertical], _CORNER[vertical]
    back = f"{_CORNER[_OPPOSITE[vertical]]} {_OPPOSITE[horizontal]}"
    forms = [
        f"{vertical} and {horizontal}", f"{vertical} and to the {horizontal}", f"{vertical}-{horizontal}",
        f"{vertical} {horizontal}", f"diagonally {vertical} and {horizontal}", f"diagonally {vertical} to the {horizontal}",
        f"towards the {corner} {horizontal}", f"to the {edge} {horizontal}", f"to the {corner} {horizontal} corner",
        f"into the {edge} {horizontal} corner", f"{vertical}wards and {horizontal}wards", f"{horizontal} and {vertical}",
        f"from the {back} to the {corner} {horizontal}", f"{vertical}ward to the {horizontal}",
        f"{vertical}wards to the {horizontal}", f"diagonally towards the {edge} {horizontal}",
    ]  # fmt: skip
    return rng.choice(forms)


def _place(background: str, rng: random.Random) -> str:
    tone, noun = rng.choice(BACKGROUND_WORDS[background]), rng.choice(BACKGROUND_NOUNS)
    forms = (
        f"{rng.choice(PREPOSITIONS)} a {tone} {noun}",
        f"{rng.choice(PREPOSITIONS)} a {tone} {noun}",
        f"{rng.choice(PREPOSITIONS)} the {tone} {noun}",
        f"with a {tone} {noun} behind it",
        f"{rng.choice(PREPOSITIONS)} a {noun} that is {tone}",
        f"with {tone} {noun}",
        f"on {tone}",
        f"everything behind is {tone}",
        f"the {noun} is {tone}",
        f"{tone} {noun}",
    )
    return rng.choice(forms)


def _sentence(subject: str, verb: tuple[str, str], adverb: str, way: str, place: str, rng: random.Random) -> str:
    base, going = verb
    goes = _third_person(base)
    before, after = (adverb, "") if rng.random() < 0.3 else ("", adverb)
    opening = rng.choice(OPENINGS)
    forms = (
        f"{subject} {before} {goes} {way} {after} {place}",
        f"{subject} {before} {goes} {way} {after} {place}",
        f"{place}, {subject} {before} {goes} {way} {after}",
        f"{place}, {subject} {before} {goes} {way} {after}",
        f"{subject} {goes} {place} {way} {after}",
        f"{opening} {subject} {before} {going} {way} {after} {place}",
        f"{opening} {subject} {before} {going} {way} {after}, {place}",
        f"{opening} {subject} {place}, {before} {going} {way} {after}",
        f"{opening} {subject} {place}. it {before} {goes} {way} {after}",
        f"{way} {after} {goes} {subject} {place}",
        f"{going} {way} {after}, {subject} {place}",
        f"{place}: {subject} {before} {going} {way} {after}",
        f"{subject} is {before} {going} {way} {after} {place}",
        f"{subject} {place} wants to {base} {way} {after}",
        f"{subject} {before} {goes} {after} and its way leads {way}, {place}",
        f"{subject}, {going} {way}, {place}, {after}",
        f"watch {subject} {base} {way} {after} {place}",
        f"{subject} starts to {base} {way} {after} {place}",
        f"{place}, and {opening} {subject} that {goes} {way} {after}",
    )
    return rng.choice(forms)


def _third_person(base: str) -> str:
    head, _, tail = base.partition(" ")
    ending = "es" if head.endswith(("s", "sh", "ch", "o")) else "s"
    return f"{head}{ending} {tail}".strip()


def caption_pool(tokenizer: Tokenizer, per_combination: int, seed: int) -> Tensor:
    """int16 [combinations, per_combination, MAX_TOKENS]: token ids of captions, 0 (the padding) behind them.

    Held-out combinations get captions too, but no training clip asks for them.
    """
    rng, total = random.Random(seed), math.prod(world.COUNTS)
    texts = [caption(world.combination_names(index), rng) for index in range(total) for _ in range(per_combination)]
    encoded = tokenizer.encode_batch(texts)
    pool = torch.zeros((len(texts), MAX_TOKENS), dtype=torch.int16)
    for row, encoding in enumerate(encoded):
        ids = [*encoding.ids[: MAX_TOKENS - 1], 1] if len(encoding.ids) > MAX_TOKENS else encoding.ids
        pool[row, : len(ids)] = torch.tensor(ids, dtype=torch.int16)
    return pool.view(total, per_combination, MAX_TOKENS)
