"""Masks: which latents are drawn anew, and pasting back what is kept. White is drawn anew, black is kept."""

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

WHITE = 128
"""The value from which a pixel counts as white."""

FEATHER = 4
"""Pixels inside the white part over which the picture that is kept fades out."""


def white(mask: Image.Image) -> Image.Image:
    """A mask of two values, 0 and 255, in mode "L"."""
    return mask.convert("L").point(lambda value: 255 if value >= WHITE else 0)


def is_white(mask: Image.Image) -> bool:
    """Whether all of a mask is white, so that nothing is kept."""
    return white(mask).getextrema() == (255, 255)


def drawn_latents(mask: Image.Image, side: int) -> Tensor:
    """Which latents are drawn anew: those of which any pixel is white, so that nothing white is too thin to be drawn.

    Args:
        mask: width and height are multiples of ``side``.
        side: pixels a side of a latent pixel.

    Returns:
        (1, 1, height/side, width/side), boolean.
    """
    pixels = torch.from_numpy(np.array(white(mask)))[None, None].float()
    return F.max_pool2d(pixels, side) > 0


def paste(drawn: Image.Image, kept: Image.Image, mask: Image.Image) -> Image.Image:
    """Lay what is kept over what was drawn: exactly where the mask is black, fading out just inside the white part.

    Args:
        drawn: RGB.
        kept: the same, of the same size.
        mask: of the same size.
    """
    shrinking = [white(mask)]
    for _ in range(FEATHER):
        shrinking.append(shrinking[-1].filter(ImageFilter.MinFilter(3)))
    share = np.mean([np.asarray(step) for step in shrinking], axis=0)  # 0 where it is black, 255 well within the white
    return Image.composite(drawn, kept, Image.fromarray(share.round().astype(np.uint8)))
