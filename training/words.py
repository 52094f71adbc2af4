"""Teach the text encoders what the words mean, before anything is drawn; afterwards they stay as they are.

Both learn to tell the thing and the background colour that a prompt asks for, whatever else it says: CLIP in its pooled
output, T5 in its tokens.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from training.batches import subject
from training.networks import TextEncoders
from training.subjects import BACKGROUNDS, THINGS

PROMPTS = 128
COLOURS = list(BACKGROUNDS)


class Reader(nn.Module):
    """Text encoders and what reads their outputs while they learn."""

    def __init__(self) -> None:
        """Make the networks, untrained."""
        super().__init__()
        self.text = TextEncoders()
        answers = len(THINGS) + len(BACKGROUNDS) + 2  # one more of each, for a prompt that does not say
        self.clip_answer = nn.Linear(self.text.clip.config.hidden_size, answers)
        self.t5_answer = nn.Linear(self.text.t5.config.d_model, answers)


def words_loss(reader: Reader) -> Callable[[random.Random], Tensor]:
    """Cross-entropy of thing and colour, from either encoder."""

    def loss(rng: random.Random) -> Tensor:
        asked = [subject(rng, empty=0.03) for _ in range(PROMPTS)]
        things = torch.tensor([THINGS.index(a.thing) if a.asks_thing else len(THINGS) for a in asked])
        colours = torch.tensor([COLOURS.index(a.colour) if a.asks_colour else len(COLOURS) for a in asked])
        text = reader.text([a.prompt for a in asked], rng.choice((256, 512)))
        answers = reader.clip_answer(text.pooled), reader.t5_answer(text.tokens.mean(1))
        split = len(THINGS) + 1
        losses = [cross_entropy(a[:, :split], things) + cross_entropy(a[:, split:], colours) for a in answers]
        return torch.stack(losses).sum()

    return loss
