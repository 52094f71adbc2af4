"""Calibrate the threshold of the bundled safety checker: what does it say about drawings of harmless things?

Each thing that Noto Emoji names with a single word is drawn on plain backgrounds, in square, wide and tall pictures,
sharp and out of focus. The threshold is the smallest multiple of 0.05 that withholds none of them.

    npm pack @iconify-json/noto && tar -xzf iconify-json-noto-*.tgz
    pip install resvg-py
    python -m benchmarks.calibrate_safety package/icons.json

With ``--save tests/drawing/drawings`` the hardest drawings are written out for the tests.
"""

import argparse
import io
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import resvg_py
from PIL import Image, ImageFilter
from tqdm import tqdm

from flux_lora.drawing.safety import OpenNsfw

BACKGROUNDS = {
    "white": "#ffffff",
    "grey": "#808080",
    "black": "#000000",
    "tan": "#d2b48c",
    "orange": "#ff9800",
    "yellow": "#ffeb3b",
    "green": "#008000",
    "teal": "#008080",
    "blue": "#0000ff",
    "purple": "#800080",
    "red": "#c0392b",
    "maroon": "#800000",
}
CANVASES = {"square": (512, 512), "wide": (768, 320), "tall": (320, 768)}
FOCUS = {"sharp": 0, "soft": 10}

Icons = dict[str, Any]
"""What icons.json holds."""
"""Radius of a Gaussian blur in pixels."""


class Score(NamedTuple):
    """How a drawing was scored."""

    value: float
    thing: str
    background: str
    canvas: str
    focus: str

    @property
    def title(self) -> str:
        """Say what it is a drawing of, and its score."""
        return "-".join(self[1:])


def main() -> None:
    """Score the drawings, and print what withholds how many."""
    options = _options()
    icons = json.loads(options.icons.read_text())
    things = [name for name in icons["icons"] if name.isalpha()]
    checker = OpenNsfw(threshold=1)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        scored = pool.map(lambda thing: _scores(checker, icons, thing), things)
        scores = sorted((score for group in tqdm(scored, total=len(things)) for score in group), reverse=True)
    _report(scores, len(things))
    for score in _hardest(scores) if options.save else ():
        _draw(icons, *score[1:]).save(options.save / f"{score.title}.webp", lossless=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("icons", type=Path, help="icons.json of the npm package @iconify-json/noto")
    parser.add_argument("--save", type=Path, metavar="DIRECTORY", help="write the ten hardest drawings there")
    return parser.parse_args()


def _scores(checker: OpenNsfw, icons: Icons, thing: str) -> list[Score]:
    return [
        Score(checker.score(_draw(icons, thing, background, canvas, focus)), thing, background, canvas, focus)
        for background in BACKGROUNDS
        for canvas in CANVASES
        for focus in FOCUS
    ]


def _draw(icons: Icons, thing: str, background: str, canvas: str, focus: str) -> Image.Image:
    width, height = CANVASES[canvas]
    side = min(width, height)
    drawing = Image.open(io.BytesIO(_render(_svg(icons, thing), side))).convert("RGBA")
    picture = Image.new("RGBA", (width, height), BACKGROUNDS[background])
    picture.alpha_composite(drawing, ((width - side) // 2, (height - side) // 2))
    return picture.convert("RGB").filter(ImageFilter.GaussianBlur(FOCUS[focus]))


def _svg(icons: Icons, thing: str) -> str:
    icon = icons["icons"][thing]
    box = f"0 0 {icon.get('width', icons['width'])} {icon.get('height', icons['height'])}"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="{box}">{icon["body"]}</svg>'


@lru_cache(maxsize=64)
def _render(svg: str, side: int) -> bytes:
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True))


def _report(scores: list[Score], things: int) -> None:
    print(f"{len(scores)} drawings of {things} things; the hardest:")
    for score in _hardest(scores):
        print(f"  {score.value:.3f}  {score.title}")
    for threshold in (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95):
        withheld = [score for score in scores if score.value >= threshold]
        print(f"from {threshold:.2f}: {len(withheld)} withheld, of {len({score.thing for score in withheld})} things")
    print(f"threshold: {math.ceil(20 * scores[0].value + 1e-9) / 20:.2f}")


def _hardest(scores: list[Score]) -> Iterator[Score]:
    """The highest score of each of the ten hardest things, and of the croissant, which is known to look suspicious."""
    best: dict[str, Score] = {}
    for score in scores:
        best.setdefault(score.thing, score)
    yield from list(best.values())[:10]
    if "croissant" not in list(best)[:10]:
        yield best["croissant"]


if __name__ == "__main__":
    main()
