"""The fine-tune's style: googly eyes on everything.

A pair of eyes is the same on each thing and at the same place of its box; where a thing has its usual size, they cover
eight whole tokens. So a LoRA has to learn one picture well, and in which of two places the thing stands.
"""

import math
from typing import NamedTuple

import numpy as np

MIDDLE = 8, 6
"""Column and row of the middle between the eyes: in units, from half a unit left of and above a thing's box. In the
usual pose of `training.album` they are the canvas's patches."""
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


def add_eyes(drawing: np.ndarray, side: float, left: float, top: float, *, mirrored: bool) -> np.ndarray:
    """Stick a pair of eyes onto a drawing.

    Args:
        drawing: (height, width, 4) floats in 0…1, not premultiplied.
        side: of its box in pixels, whose left top corner is at ``left`` and ``top``.
        left: in pixels, too.
        top: likewise.
        mirrored: the eyes change places with the drawing; where they look does not.

    Returns:
        Another such array.
    """
    unit = side / UNITS
    column, row = MIDDLE
    if mirrored:
        column = UNITS + 1 - column
    for eye in PAIR:
        x, y = left + (column - 0.5 + eye.right) * unit, top + (row - 0.5) * unit
        drawing = _disc(drawing, BLACK, x, y, eye.radius * unit)
        drawing = _disc(drawing, WHITE, x, y, (eye.radius - RIM) * unit)
        drawing = _disc(drawing, BLACK, x + eye.look[0] * unit, y + eye.look[1] * unit, PUPIL * eye.radius * unit)
    return drawing


def _disc(drawing: np.ndarray, colour: tuple[float, ...], x: float, y: float, radius: float) -> np.ndarray:
    """Lay a disc with a smooth rim over a drawing: nothing changes beyond the box that the disc is in."""
    (top, bottom), (left, right) = (
        (max(0, math.floor(middle - radius - 1)), math.ceil(middle + radius + 1)) for middle in (y, x)
    )
    box = drawing[top:bottom, left:right]
    rows, columns = np.ogrid[top : top + box.shape[0], left : left + box.shape[1]]
    over = np.clip(radius + 0.5 - np.hypot(columns + 0.5 - x, rows + 0.5 - y), 0, 1)[..., None]
    colours, cover = box[..., :3], box[..., 3:] * (1 - over)
    total = over + cover
    mixed = (over * np.array(colour) + cover * colours) / np.maximum(total, 1e-6)
    drawing = drawing.copy()
    drawing[top:bottom, left:right] = np.concatenate([mixed, total], axis=-1)
    return drawing
