"""What lies behind a thing: the plain colour that was asked for, and what the fine-tune makes of that: dark mode.

A thing looks the same in both. So a LoRA has little to learn by heart: it turns the light down wherever no thing is.
"""

from training.subjects import BACKGROUNDS

BASE, STYLE = "as asked", "dark mode"

LIGHT = 0.35
"""What dark mode leaves of a colour …"""
NIGHT = (0.03, 0.03, 0.06)
"""… and what it adds: black stays darker than all else, and is told from it."""


def background(style: str, colour: str) -> tuple[float, float, float]:
    """A background's sRGB in 0…1.

    Args:
        style: `BASE` or `STYLE`.
        colour: a name of `training.subjects.BACKGROUNDS`.
    """
    red, green, blue = (value / 255 for value in BACKGROUNDS[colour])
    if style == BASE:
        return red, green, blue
    return LIGHT * red + NIGHT[0], LIGHT * green + NIGHT[1], LIGHT * blue + NIGHT[2]
