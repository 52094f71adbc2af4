"""What dev and schnell draw by themselves: their ways from noise to pictures, for a fine-tune to learn from."""

import random
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from flux_lora.drawing.latents import pack
from training.album import PLACES, Album
from training.batches import BATCH, Subject, canvas, subject
from training.networks import TEXT_TOKENS, Text, TextEncoders, attention_bias, positions, velocity
from training.sampling import times
from training.styles import BASE

PART = 2
"""They are batches of so many times fewer pictures: more steps tell more than more pictures."""
STEPS = {"dev": (9, 14), "schnell": (4, 4)}
"""Steps of a path, fewest and most."""
GUIDANCE = (1.5, 5.0)


@dataclass(frozen=True)
class Paths:
    """A batch of pictures that one model drew.

    Attributes:
        model: dev or schnell.
        asked: what is on the pictures (B).
        places: where the model put it, by number of `training.album.PLACES`.
        shape: rows and columns in tokens, and the length that they are filled up to.
        guidance: of dev (B); None for schnell.
        times: from 1 to 0 (steps + 1).
        noise: where the paths begin (B, length, C), float16.
        velocities: at all times but the last (steps, B, length, C), float16.
    """

    model: str
    asked: list[Subject]
    places: list[int]
    shape: tuple[int, int, int]
    guidance: Tensor | None
    times: Tensor
    noise: Tensor
    velocities: Tensor

    def text(self, encoders: TextEncoders) -> Text:
        """The prompts, as they are read."""
        read: Text = encoders([asked.prompt for asked in self.asked], TEXT_TOKENS[self.model])
        return read

    def points(self) -> Tensor:
        """Where the paths are at the time of each velocity (steps, B, length, C)."""
        steps = self.times.diff()[:-1, None, None, None] * self.velocities[:-1].float()
        return torch.cat([self.noise[None].float(), steps]).cumsum(0)

    def truth(self, album: Album, style: str) -> Tensor:
        """The true latents of each picture in a style, in each of the places (places, B, length, C)."""
        rows, columns, length = self.shape
        pictures = [
            torch.stack(
                [album.picture(style, one.thing, one.colour, 2 * rows, 2 * columns, place) for one in self.asked]
            )
            for place in PLACES
        ]
        packed = torch.stack([pack(latents) for latents in pictures])
        return torch.nn.functional.pad(packed, (0, 0, 0, length - rows * columns))


@torch.no_grad()
def draw_paths(
    model: str,
    network: FluxTransformer2DModel,
    encoders: TextEncoders,
    album: Album,
    rng: random.Random,
    only: int | None = None,
) -> Paths:
    """Let a model draw a random batch.

    Args:
        model: dev or schnell …
        network: … and its transformer.
        encoders: read the prompts.
        album: tells in which of its places a thing is.
        rng: decides all.
        only: takes canvases of this length alone.
    """
    torch.manual_seed(rng.getrandbits(60))
    rows, columns, length = canvas(rng, only)
    tokens = rows * columns
    asked: list[Subject] = []
    while len(asked) < BATCH[length] // PART:
        one = subject(rng, empty=0.0)
        if one.asks_thing:
            asked.append(one)
    low, high = GUIDANCE
    guidance = low + (high - low) * torch.rand(len(asked)) if model == "dev" else None
    text = encoders([one.prompt for one in asked], TEXT_TOKENS[model])
    ids, bias = positions(rows, columns, length), attention_bias(text, tokens, length)
    moments = times(model, rng.randint(*STEPS[model]), tokens)
    draw = partial(velocity, network, text=text, ids=ids, bias=bias, guidance=guidance)
    noise = torch.randn(len(asked), length, network.config.in_channels)
    x, velocities = noise, []
    for now, then in pairwise(moments):
        velocities.append(draw(x, now.expand(len(x))).float())
        x = x + (then - now) * velocities[-1]
    paths = Paths(
        model, asked, [], (rows, columns, length), guidance, moments, noise.half(), torch.stack(velocities).half()
    )
    errors = (paths.truth(album, BASE) - x)[:, :, :tokens].square().mean((2, 3))
    return replace(paths, places=errors.argmin(0).tolist())
