"""Latents of one image: noise from its seed, packing as FLUX.1 wants it, and sizes on the model's grid.

FLUX.1's transformer sees a latent (1, C, h, w) as (1, h/2·w/2, 4C): one token for each 2×2 latent pixels
(https://github.com/black-forest-labs/flux, ``sampling.py``).
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def initial_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Standard normal noise (1, channels, height, width), float32, on the CPU.

    A function of the seed alone: drawn in float32 whatever the model's type, so that a seed means the same picture on
    every device. PyTorch's CPU generator (mt19937) reads the low 32 bits of the seed.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn((1, channels, height, width), generator=generator, dtype=torch.float32)


def pack(latents: Tensor) -> Tensor:
    """(1, C, h, w) -> (1, h/2·w/2, 4C)."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """(1, h/2·w/2, 4C) -> (1, C, h, w), the inverse of `pack`; ``height`` and ``width`` in latent pixels."""
    batch, _, channels = tokens.shape
    patches = tokens.view(batch, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels // 4, height, width)


def drawable(size: int, grid: int) -> int:
    """The smallest multiple of ``grid`` pixels that holds ``size``; ``size`` itself where the grid divides it."""
    return -(-size // grid) * grid


def extend(image: Image.Image, width: int, height: int) -> Image.Image:
    """An image in whose centre is the given one, with its edges repeated outwards: the inverse of `crop_centre`."""
    left, top = (width - image.width) // 2, (height - image.height) // 2
    sides = [(top, height - image.height - top), (left, width - image.width - left)]
    array = np.asarray(image)
    return Image.fromarray(np.pad(array, sides + [(0, 0)] * (array.ndim - 2), mode="edge"))


def crop_centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """The central width×height pixels; the image itself when it has that size."""
    if image.size == (width, height):
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
