"""Encoding a picture of 1024×1024: seconds of one core, size and loss by format, quality and effort.

    scripts/bench save

Drawings are the miniature's; photographs those of scikit-image, enlarged, one of them with the grain of a film. A file
gets none of its metadata here, which `outputs.encode` adds to it, nor its signature.
"""

import argparse
import io
import math
import os
import statistics
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from skimage import data

from benchmarks.measure import machine
from flux_lora.assembly import assemble
from flux_lora.request import Request
from flux_lora.settings import Settings

SIDE = 1024
PROMPTS = ("a tomato on a blue background", "an owl on a purple background", "a photo of TOK")
GRAIN = 4.0
"""Standard deviation of a film's grain, in levels."""


class Way(NamedTuple):
    """A way of encoding."""

    name: str
    kind: str
    options: dict[str, Any]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="scripts/bench save", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="the fastest counts")
    parser.add_argument("--quality", type=int, nargs="+", default=[80, 90, 98, 100])
    options = parser.parse_args()
    pictures = {"drawings": list(_drawings()), "photographs": list(_photographs())}
    print(machine())
    print("medians: " + ", ".join(f"{len(of_kind)} {kind}" for kind, of_kind in pictures.items()) + "\n")
    print(f"{'':28}" + "".join(f"{kind:^36}" for kind in pictures))
    for way in _ways(options.quality):
        row = f"{way.name:28}"
        for of_kind in pictures.values():
            measured = [_measure(way, picture, options.rounds) for picture in of_kind]
            seconds, size, loss = (statistics.median(values) for values in zip(*measured, strict=True))
            row += f"{1000 * seconds:9.1f} ms{size / 1024:10.1f} KiB{loss:8.2f} dB "
        print(row)
    return 0


def _drawings() -> Iterator[Image.Image]:
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        generator = assemble(Settings.from_environment(), log=lambda _: None)
        for prompt in PROMPTS:
            (path,) = generator.draw(Request.parse(prompt=prompt, seed=1, output_format="png"))
            yield Image.open(path).convert("RGB")


def _photographs() -> Iterator[Image.Image]:
    for pixels in (data.astronaut(), data.stereo_motorcycle()[0], data.retina(), data.hubble_deep_field()):
        side = min(pixels.shape[:2])
        top, left = ((length - side) // 2 for length in pixels.shape[:2])
        square = Image.fromarray(pixels[top : top + side, left : left + side])
        photograph = square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        yield photograph
        if pixels.shape[0] == pixels.shape[1] == SIDE // 2:
            grain = np.random.default_rng(0).normal(0, GRAIN, (SIDE, SIDE, 1))
            yield Image.fromarray((np.asarray(photograph) + grain).clip(0, 255).round().astype(np.uint8))


def _ways(qualities: list[int]) -> Iterator[Way]:
    for quality in qualities:
        for method in range(7):
            yield Way(f"WebP {quality}, method {method}", "WEBP", {"quality": quality, "method": method})
    for quality in qualities:
        chroma = "4:4:4" if quality >= 90 else "4:2:0"
        for optimize in (False, True):
            given = {"quality": quality, "subsampling": chroma, "optimize": optimize}
            yield Way(f"JPEG {quality}{', optimized' if optimize else ''}", "JPEG", given)
    for level in (1, 3, 6):
        yield Way(f"PNG, level {level}", "PNG", {"compress_level": level})
    yield Way("PNG, runs alone", "PNG", {"compress_type": zlib.Z_RLE})


def _measure(way: Way, picture: Image.Image, rounds: int) -> tuple[float, int, float]:
    """Seconds, bytes, and PSNR in dB."""
    seconds = math.inf
    for _ in range(rounds):
        file = io.BytesIO()
        started = time.process_time()
        picture.save(file, way.kind, **way.options)
        seconds = min(seconds, time.process_time() - started)
    with Image.open(io.BytesIO(file.getvalue())) as decoded:
        error = np.square(np.asarray(decoded.convert("RGB"), dtype=np.float64) - np.asarray(picture)).mean()
    return seconds, len(file.getvalue()), 10 * math.log10(255**2 / error) if error else math.inf


if __name__ == "__main__":
    sys.exit(main())
