import random

from training import batches
from training.batches import Subject
from training.subjects import BACKGROUNDS, THINGS, UNNAMED_BACKGROUND, held_out


def test_no_picture_nor_prompt_of_a_held_out_pair_is_ever_trained_on() -> None:
    rng = random.Random(0)
    seen: list[Subject] = [batches.subject(rng, empty=0.1) for _ in range(40_000)]
    pairs = {(asked.thing, asked.colour) for asked in seen}
    assert len(pairs) == len(THINGS) * (len(BACKGROUNDS) - 1)
    assert not any(colour == held_out(thing) for thing, colour in pairs)
    assert UNNAMED_BACKGROUND not in map(held_out, THINGS)
    assert len(set(map(held_out, THINGS))) == len(BACKGROUNDS) - 1
