"""Train the autoencoder's smoothing network: from latents that are a little wrong back to the picture.

Latents that a transformer draws are never exact, and a linear code shows each error as a ragged edge at the border of
two patches. The network sees codes of real pictures with noise on them, and learns what edges look like.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import l1_loss
from tqdm import tqdm

from flux_lora.checkpoint.patch_autoencoder import PatchAutoencoder
from training.album import PATCH, draw_pose, poses
from training.styles import BASE, STYLE, background
from training.subjects import BACKGROUNDS, THINGS

CROP = 8
"""Patches a side of the crops that are learned from."""
DRAWINGS, CROPS, BATCH = 240, 10, 8
"""Drawings that are rendered once, crops of each, and crops a step."""
NOISE = 0.12
"""Highest standard deviation of the noise on latents."""


def smoothing_loss(autoencoder: PatchAutoencoder) -> Callable[[random.Random], Tensor]:
    """Mean absolute error of decoded crops; the linear code itself stays as it is."""
    autoencoder.requires_grad_(False)
    for part in (autoencoder.smooth_in, autoencoder.smooth, autoencoder.smooth_out):
        part.requires_grad_(True)
    rng = random.Random(0)
    rendered = torch.cat([crops(rng) for _ in tqdm(range(DRAWINGS), desc="drawings")])
    stored = ((rendered + 1) * 127.5).round().byte()

    def loss(rng: random.Random) -> Tensor:
        pictures = stored[rng.sample(range(len(stored)), BATCH)].float() / 127.5 - 1
        with torch.no_grad():
            latents = autoencoder.encode(pictures).latents
            level = torch.rand(len(latents), 1, 1, 1) * NOISE
            latents = latents + level * torch.randn_like(latents)
        return l1_loss(autoencoder.decode(latents).sample, pictures)

    return loss


def crops(rng: random.Random) -> Tensor:
    """Crops (CROPS, 3, CROP·32, CROP·32) in −1…1 of one drawing on a background, where there is something to see."""
    thing, colour = rng.choice(THINGS), rng.choice(list(BACKGROUNDS))
    style = BASE if rng.random() < 0.7 else STYLE
    drawing = torch.from_numpy(draw_pose(thing, rng.choice(poses(thing))))
    picture = drawing[..., :3] + (1 - drawing[..., 3:]) * (2 * torch.tensor(background(style, colour)) - 1)
    side = CROP * PATCH
    if min(picture.shape[:2]) < side:
        pad = [max(0, side - length) for length in picture.shape[:2]]
        picture = torch.nn.functional.pad(picture.permute(2, 0, 1), (0, pad[1], 0, pad[0]), mode="replicate").permute(
            1, 2, 0
        )
    corners = [[rng.randint(0, length - side) for length in picture.shape[:2]] for _ in range(CROPS)]
    return torch.stack([picture[top : top + side, left : left + side] for top, left in corners]).permute(0, 3, 1, 2)
