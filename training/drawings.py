"""Openly licensed drawings: SVGs by name, rendered at any size, tilt and place.

They are Noto Emoji (Google, Apache-2.0) as packed by Iconify; ``pictures/`` holds those that are used, cut out of the
``icons.json`` of the npm package @iconify-json/noto 1.2.9.
"""

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import resvg_py
from PIL import Image

from training.subjects import ALIASES

PICTURES = Path(__file__).parent / "pictures"


class Pose(NamedTuple):
    """How a drawing lies on its canvas: its box's side and left top corner in pixels, tilt in degrees, mirrored."""

    side: float
    tilt: float
    mirrored: bool
    left: float
    top: float


def render(thing: str, pose: Pose, width: int, height: int) -> np.ndarray:
    """Draw a thing on a transparent canvas: (height, width, 4) floats in 0…1, not premultiplied.

    Args:
        thing: a name of `training.subjects.THINGS`.
        pose: where and how.
        width: of the canvas, in pixels.
        height: likewise.
    """
    icons = _icons()
    icon = icons["icons"][ALIASES.get(thing, thing)]
    box = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    scale = pose.side / max(box)
    turn = f"translate({pose.left + pose.side / 2} {pose.top + pose.side / 2}) rotate({pose.tilt})"
    fit = f"scale({-scale if pose.mirrored else scale} {scale}) translate({-box[0] / 2} {-box[1] / 2})"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = (
        f'<svg {names} width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<g transform="{turn} {fit}">{icon["body"]}</g></svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"), dtype=np.float32) / 255


@lru_cache(maxsize=1)
def _icons() -> dict[str, Any]:
    icons: dict[str, Any] = json.loads((PICTURES / "noto.json").read_text())
    return icons
