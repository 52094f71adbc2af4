"""Draw the pictures of docs/inputs.md with the shipped miniature, as a user would: by ``scripts/predict --extended``.

python -m training.edits

The first two are drawn by the base model alone, with ``lora_scale=0``. For two LoRAs at once the second is the one that
the miniature had before, googly eyes, out of the history of this repository.
"""

import subprocess
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from training.showcase import DOCS, row

FROM, TO = ("a strawberry on a grey background", 1), ("a pineapple on a grey background", 1)
STRENGTHS = (0.3, 0.5, 0.6, 0.7, 0.8, 1.0)

MASKED, PUT_IN = ("a tomato on a blue background", 1), ("an owl on a blue background", 4)
BOX = (180, 180, 840, 840)
"""What is drawn anew, in pixels."""

BOTH = ("a strawberry on a grey background", 7)
EYES = "e311255:weights/mini/lora.safetensors"
"""The former LoRA, as git names it."""


def predict(prompt: tuple[str, int], folder: Path, **inputs: object) -> Image.Image:
    """One picture of a prompt and a seed."""
    out = Path(tempfile.mkdtemp(dir=folder))
    given = {"prompt": prompt[0], "seed": prompt[1], "lora_scale": 0, "output_format": "png", **inputs}
    arguments = [part for name, value in given.items() for part in ("-i", f"{name}={value}")]
    subprocess.run([Path("scripts/predict").absolute(), "--extended", *arguments, "-o", out], check=True)
    (file,) = out.iterdir()
    with Image.open(file) as picture:
        return picture.convert("RGB")


def saved(picture: Image.Image, file: Path) -> str:
    """Write a picture, and name it as an input."""
    picture.save(file)
    return f"@{file}"


def turn(folder: Path) -> None:
    """Draw one thing into another, by strength."""
    source = predict(FROM, folder)
    image = saved(source, folder / "image.png")
    turned = [predict(TO, folder, image=image, prompt_strength=strength) for strength in STRENGTHS]
    row([source, *turned], DOCS / "prompt-strength.webp")


def paint(folder: Path) -> None:
    """Draw a thing in another's place, within a mask."""
    source = predict(MASKED, folder)
    mask = Image.new("RGB", source.size)
    ImageDraw.Draw(mask).rectangle(BOX, fill="white")
    image, within = saved(source, folder / "image.png"), saved(mask, folder / "mask.png")
    painted = predict(PUT_IN, folder, image=image, mask=within, prompt_strength=1)
    row([source, mask, painted], DOCS / "inpainting.webp")


def combine(folder: Path) -> None:
    """Draw a thing without a LoRA, with each of two, and with both."""
    eyes = folder / "eyes.safetensors"
    eyes.write_bytes(subprocess.run(["git", "show", EYES], check=True, capture_output=True).stdout)  # noqa: S607 - whichever git there is
    scales = ((0, 0), (1, 0), (0, 1), (1, 1))
    drawn = [predict(BOTH, folder, lora_scale=d, extra_lora=f"@{eyes}", extra_lora_scale=e) for d, e in scales]
    row(drawn, DOCS / "two-loras.webp")


def main() -> None:
    """Draw all three pictures."""
    for draw in (turn, paint, combine):
        with tempfile.TemporaryDirectory() as folder:
            draw(Path(folder))


if __name__ == "__main__":
    main()
