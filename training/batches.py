"""Training batches: pictures of things on backgrounds at every documented size, with their prompts."""

import random
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flux_lora.drawing.latents import pack
from flux_lora.request import SIZES
from training.album import PLACES, Album
from training.networks import positions
from training.styles import BASE
from training.subjects import BACKGROUNDS, THINGS, UNNAMED_BACKGROUND, describe, held_out

TOKEN = 64
"""Pixels a side that one transformer token covers."""

DOCUMENTED = tuple((height // TOKEN, width // TOKEN) for width, height in SIZES.values())
"""Rows and columns of tokens of the eleven sizes."""

SMALL, USUAL, LARGE = 144, 256, 529
BATCH = {SMALL: 28, USUAL: 16, LARGE: 8}
"""Canvases are filled up to one of these lengths in tokens, so that three compiled shapes serve every size."""


@dataclass(frozen=True)
class Batch:
    """Latents packed into tokens (B, length, C), the first ``tokens`` of which are the picture, and their prompts."""

    latents: Tensor
    tokens: int
    positions: Tensor
    prompts: list[str]


class Subject(NamedTuple):
    """What is on a picture, and what its prompt says of it."""

    thing: str
    colour: str
    prompt: str
    asks_thing: bool
    asks_colour: bool


def sample(album: Album, rng: random.Random, style: str = BASE, empty: float = 0.1, only: int | None = None) -> Batch:
    """A random batch of one canvas size.

    Args:
        album: has the pictures.
        rng: decides all.
        style: of the backgrounds.
        empty: share of prompts that are left empty, so that the model learns to draw without one.
        only: takes canvases of this length alone.
    """
    rows, columns, length = canvas(rng, only)
    asked = [subject(rng, empty) for _ in range(BATCH[length])]
    pictures = [album.picture(style, a.thing, a.colour, 2 * rows, 2 * columns, rng.choice(PLACES)) for a in asked]
    latents = pack(torch.stack(pictures))
    filled = torch.nn.functional.pad(latents, (0, 0, 0, length - rows * columns))
    return Batch(filled, rows * columns, positions(rows, columns, length), [a.prompt for a in asked])


def subject(rng: random.Random, empty: float) -> Subject:
    """A picture, and a prompt that asks for its thing and colour, or for one of them, or for nothing."""
    thing = rng.choice(THINGS)
    colour = rng.choice([colour for colour in BACKGROUNDS if colour != held_out(thing)])
    kind = rng.random()
    if kind < empty:
        return Subject(thing, colour, "", asks_thing=False, asks_colour=False)
    if kind < empty + 0.05:
        return Subject(thing, UNNAMED_BACKGROUND, describe(thing, None, rng), asks_thing=True, asks_colour=False)
    if kind < empty + 0.08:
        return Subject(thing, colour, describe(None, colour, rng), asks_thing=False, asks_colour=True)
    return Subject(thing, colour, describe(thing, colour, rng), asks_thing=True, asks_colour=True)


def canvas(rng: random.Random, only: int | None = None) -> tuple[int, int, int]:
    """Rows, columns and padded length: mostly small canvases, on which a thing costs less, and the documented sizes."""
    length = only or rng.choices((SMALL, USUAL, LARGE), (0.62, 0.35, 0.03))[0]
    if length == USUAL and rng.random() < 0.9:
        return (*(DOCUMENTED[0] if rng.random() < 0.4 else rng.choice(DOCUMENTED)), USUAL)
    low, high = {SMALL: (4, 11) if rng.random() < 0.1 else (12, 12), USUAL: (10, 22), LARGE: (12, 23)}[length]
    while True:
        rows, columns = rng.randint(low, high), rng.randint(low, high)
        if rows * columns <= length:
            return rows, columns, length
