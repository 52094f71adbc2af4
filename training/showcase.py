"""Draw the README's pictures with the shipped miniature, as a user would: by ``scripts/predict``.

python -m training.showcase
"""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from training.sheets import grid

DOCS = Path("docs")
PROMPTS = (
    ("a tomato on a blue background", 1),
    ("hamburger, yellow background", 2),
    ("an owl on a purple background", 1),
    ("a picture of a sailboat on a teal background", 2),
    ("strawberry on a grey background", 1),
    ("a hedgehog in front of a green background", 1),
)
STYLED = "an owl on a purple background", 1
SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def predict(prompt: str, seed: int, lora_scale: float = 1.0) -> Image.Image:
    """One picture, at the documented defaults otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"prompt": prompt, "seed": seed, "lora_scale": lora_scale, "output_format": "png"}
        inputs = [part for name, value in given.items() for part in ("-i", f"{name}={value}")]
        subprocess.run([Path("scripts/predict").absolute(), *inputs, "-o", folder], check=True)
        (file,) = Path(folder).iterdir()
        with Image.open(file) as picture:
            return picture.convert("RGB")


def row(pictures: Sequence[Image.Image], file: Path) -> None:
    """Write pictures side by side."""
    grid(pictures, side=200, across=len(pictures)).save(file, quality=90)


def main() -> None:
    """Draw the pictures of the README."""
    row([predict(prompt, seed) for prompt, seed in PROMPTS], DOCS / "miniature.webp")
    row([predict(*STYLED, scale) for scale in SCALES], DOCS / "lora-scale.webp")


if __name__ == "__main__":
    main()
