"""What an image is becoming, seen in the middle of drawing: a small picture, made without the VAE's network.

FLUX.1 was trained to go from noise ε to an image x in straight lines, x_σ = (1 − σ)·x + σ·ε
(https://arxiv.org/abs/2403.03206, section 2). The noise of an image is known from its seed, so what the latents of any
step are on the way to is (x_σ − σ·ε) / (1 − σ): blurred at first, and the image itself at the end. A linear map makes
colours of it.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from flux_lora.checkpoint.patch_autoencoder import PatchAutoencoder
from flux_lora.drawing.latents import drawable, initial_noise, unpack
from flux_lora.drawing.pipeline import Autoencoder, Pipeline

CELLS = 4
"""A side: into how many pixels of a preview a latent pixel of the miniature is made, which stands for 32 of its own."""

FLUX_COLOURS = (
    (-0.0346, 0.0244, 0.0681),
    (0.0034, 0.0210, 0.0687),
    (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617),
    (0.0859, 0.0721, 0.0329),
    (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915),
    (-0.0236, -0.0185, -0.0259),
    (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421),
    (-0.0515, 0.0201, 0.0011),
    (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749),
    (-0.1264, -0.0522, -0.1103),
    (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
)
"""Red, green and blue of each channel of FLUX.1's latents, as others have fitted them by least squares
(https://github.com/comfyanonymous/ComfyUI, ``latent_formats.py``)."""

FLUX_OFFSET = (-0.0329, -0.0718, -0.0851)


@dataclass(frozen=True)
class Colours:
    """A linear map of latents to colours in −1…1."""

    weight: Tensor
    """(3·k·k, C): each latent pixel becomes k×k pixels."""
    offset: Tensor
    """(3·k·k,)"""
    cells: int
    """k"""

    def of(self, latents: Tensor) -> Tensor:
        """(1, C, h, w) -> (3, k·h, k·w)."""
        flat = F.conv2d(latents, self.weight[:, :, None, None], self.offset)
        return F.pixel_shuffle(flat, self.cells)[0]


def colours_of(vae: Autoencoder) -> Colours | None:
    """The map that belongs to an autoencoder; None if there is none for its kind.

    That of the miniature is computed from its weights: the mean over each cell of what its linear part decodes.
    """
    if isinstance(vae, PatchAutoencoder):
        synthesis = vae.synthesis
        weight = F.adaptive_avg_pool2d(synthesis.weight.detach().float().cpu(), CELLS)  # (C, 3, k, k)
        bias = torch.zeros(3) if synthesis.bias is None else synthesis.bias.detach().float().cpu()
        weight = weight.flatten(1).T / vae.config.scaling_factor
        offset = bias.repeat_interleave(CELLS**2) + weight.sum(1) * vae.config.scaling_factor * vae.config.shift_factor
        return Colours(weight, offset, CELLS)
    if getattr(vae.config, "latent_channels", None) == len(FLUX_COLOURS):
        return Colours(torch.tensor(FLUX_COLOURS).T, torch.tensor(FLUX_OFFSET), 1)
    return None


def towards(latents: Tensor, noise: Tensor, level: float) -> Tensor:
    """The image that latents with a level of noise, 0 to below 1, are on the way to."""
    return (latents - level * noise) / (1 - level)


def preview(
    pipeline: Pipeline, colours: Colours, tokens: Tensor, seed: int, size: tuple[int, int], steps_left: int
) -> Image.Image:
    """What an image is becoming, small.

    Args:
        pipeline: draws it.
        colours: of its autoencoder.
        tokens: the latents of now, packed: (1, h/2·w/2, 4C).
        seed: of the image's noise.
        size: of the image, width and height in pixels.
        steps_left: how many steps are still to be taken.
    """
    compression = pipeline.vae_scale_factor
    columns, rows = (drawable(length, grid=2 * compression) // compression for length in size)
    latents = unpack(tokens.detach().float().cpu(), rows, columns)
    noise = initial_noise(seed, latents.shape[1], rows, columns)
    level = float(pipeline.scheduler.sigmas[len(pipeline.scheduler.sigmas) - 1 - steps_left])
    pixels = colours.of(towards(latents, noise, level))
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    image = Image.fromarray(values.permute(1, 2, 0).numpy())
    width, height = (max(1, round(length * colours.cells / compression)) for length in size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
