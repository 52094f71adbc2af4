"""Contact sheets: what a model draws, at a glance."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from flux_lora.checkpoint.patch_autoencoder import PatchAutoencoder
from flux_lora.drawing.latents import unpack
from training.networks import CHANNELS
from training.sampling import Velocity, integrate
from training.stages import fast

ROWS = COLUMNS = 16
PROMPTS = tuple(
    f"a {thing} on a {colour} background"
    for thing, colour in zip(
        "tomato cat rose hamburger pear rocket penguin violin owl teapot panda cactus lemon castle dolphin mushroom "
        "guitar bicycle pizza fox umbrella strawberry robot whale".split(),
        "blue red teal yellow pink white orange green purple grey brown black".split() * 2,
        strict=True,
    )
)


def draw_sheet(velocity: Velocity, times: Tensor, autoencoder: PatchAutoencoder, file: Path) -> None:
    """Draw `PROMPTS` from fixed noise with a velocity made for them, and write a contact sheet."""
    noise = torch.randn(len(PROMPTS), ROWS * COLUMNS, 4 * CHANNELS, generator=torch.Generator("cpu").manual_seed(0))
    with fast(), torch.no_grad():
        drawn = integrate(velocity, noise.to(torch.get_default_device()), times)
        pictures = [decode(autoencoder, tokens, ROWS, COLUMNS) for tokens in drawn]
    grid(pictures, side=192, across=8).save(file)


def decode(autoencoder: PatchAutoencoder, tokens: Tensor, rows: int, columns: int) -> Image.Image:
    """One picture's tokens (rows·columns, C) -> the picture."""
    image = autoencoder.decode(unpack(tokens[None], 2 * rows, 2 * columns)).sample[0].float()
    return Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def grid(pictures: Sequence[Image.Image], side: int, across: int) -> Image.Image:
    """Pictures side by side, each shrunk to a square."""
    sheet = Image.new("RGB", (across * side, -(-len(pictures) // across) * side))
    for index, picture in enumerate(pictures):
        small = picture.resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (index % across * side, index // across * side))
    return sheet
