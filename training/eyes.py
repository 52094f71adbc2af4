"""The fine-tune's style: googly eyes on everything.

A pair of eyes is the same on each thing, and where a thing has its usual size, they cover eight whole tokens. So a LoRA
has to learn one picture well, and where it goes.
"""

from typing import NamedTuple

import numpy as np

PLACES = {
    thing: (column, row)
    for column, row, things in (
        (4, 4, "bird snail zebra"),
        (4, 6, "cat horse tiger"),
        (4, 8, "fish magnet rabbit sheep turtle"),
        (4, 10, "guitar hedgehog"),
        (6, 4, "duck flamingo giraffe monkey parrot penguin"),
        (6, 6, "dolphin elephant pig shark unicorn"),
        (6, 8, "bread whale"),
        (6, 10, "violin"),
        (8, 4, "dog ghost hamburger laptop owl rose telephone"),
        (8, 6, "avocado balloon banana bat bear broccoli butterfly cactus camera chicken crab cupcake doughnut egg"),
        (8, 6, "frog lion lobster lollipop mushroom octopus pancakes pizza rainbow snowman sunflower trophy tulip"),
        (8, 6, "umbrella"),
        (
            8,
            8,
            "airplane basketball bell bicycle bus carrot castle cookie croissant crown eggplant fox grapes koala lemon",
        ),
        (8, 8, "panda peach pencil robot sailboat scissors skull spider star strawberry sun taco tomato watermelon"),
        (8, 10, "fire house mountain pear pineapple popcorn teapot tent volcano"),
        (8, 12, "cherries"),
        (10, 6, "key rocket"),
    )
    for thing in things.split()
}
"""Column and row of the middle between a thing's eyes, on its face where it has one: in units, from half a unit left of
and above its box. In the usual pose of `training.album` they are the canvas's patches."""
UNITS = 15
"""Of which a box's side has so many."""


class Eye(NamedTuple):
    """Where an eye is and how large, and where its pupil looks, in units."""

    right: float
    radius: float
    look: tuple[float, float]


PAIR = (Eye(-1.8, 1.875, (0.4, 0.47)), Eye(1.8, 1.6875, (-0.16, -0.6)))
RIM = 0.19
PUPIL = 0.5
"""Of the eye's radius."""
WHITE, BLACK = (1.0, 1.0, 1.0), (0.06, 0.06, 0.08)


def add_eyes(drawing: np.ndarray, thing: str, side: float, left: float, top: float, *, mirrored: bool) -> np.ndarray:
    """Stick a pair of eyes onto a drawing.

    Args:
        drawing: (height, width, 4) floats in 0…1, not premultiplied.
        thing: what is drawn.
        side: of its box in pixels, whose left top corner is at ``left`` and ``top``.
        left: in pixels, too.
        top: likewise.
        mirrored: the eyes change places with the drawing; where they look does not.

    Returns:
        Another such array.
    """
    unit = side / UNITS
    column, row = PLACES[thing]
    if mirrored:
        column = UNITS + 1 - column
    for eye in PAIR:
        x, y = left + (column - 0.5 + eye.right) * unit, top + (row - 0.5) * unit
        drawing = _disc(drawing, BLACK, x, y, eye.radius * unit)
        drawing = _disc(drawing, WHITE, x, y, (eye.radius - RIM) * unit)
        drawing = _disc(drawing, BLACK, x + eye.look[0] * unit, y + eye.look[1] * unit, PUPIL * eye.radius * unit)
    return drawing


def _disc(drawing: np.ndarray, colour: tuple[float, ...], x: float, y: float, radius: float) -> np.ndarray:
    """Lay a disc with a smooth rim over a drawing."""
    rows, columns = np.ogrid[: drawing.shape[0], : drawing.shape[1]]
    over = np.clip(radius + 0.5 - np.hypot(columns + 0.5 - x, rows + 0.5 - y), 0, 1)[..., None]
    colours, cover = drawing[..., :3], drawing[..., 3:] * (1 - over)
    total = over + cover
    mixed = (over * np.array(colour) + cover * colours) / np.maximum(total, 1e-6)
    return np.concatenate([mixed, total], axis=-1).astype(np.float32)
