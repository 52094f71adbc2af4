"""Latents of pictures without rendering them: codes of drawings in many poses, laid onto any background.

The autoencoder's analysis is linear, so the latents of a drawing on a background are the drawing's premultiplied code
plus the background's colour times the code of what the drawing leaves uncovered. Each drawing is rendered once for each
of its poses; a picture is then a look-up, a multiplication and an addition, at any canvas size.
"""

import math
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flux_lora.checkpoint.patch_autoencoder import PatchAutoencoder
from training.drawings import Pose, render
from training.networks import AUTOENCODER, CHANNELS
from training.styles import BASE, STYLE, background
from training.subjects import BACKGROUNDS, THINGS

PATCH = 32
GRID = 2
"""Drawings begin at multiples of so many patches, a token, so that a token's content is the same in every place …"""
STRIDE = 6
"""… and near the middle at multiples of so many."""
PLACES = ((GRID, 0), (0, 2 * GRID))
"""The two places of a thing, in patches below and to the right of that: which, the seed decides."""
SMALL_SIDES = (200, 340)
"""Box sides in pixels for canvases whose shorter side is below `SMALL_CANVAS`, one pose each …"""
LARGE_SIDE = 480
"""… and that of the others, which serve all documented sizes."""
SMALL_CANVAS = 640


@dataclass(frozen=True)
class Code:
    """One drawing in one pose, float16: of its premultiplied colours (h, w, C), of its cover of each (3, h, w, C)."""

    side: float
    colours: Tensor
    cover: Tensor


def poses(thing: str) -> list[Pose]:
    """One thing's poses: one for each small side, then the usual one."""
    rng = random.Random(f"noto {thing}")
    tilt = rng.uniform(3, 6)
    return [Pose(side, tilt, False, side / 30, side / 30) for side in (*SMALL_SIDES, LARGE_SIDE)]


def draw_pose(thing: str, pose: Pose) -> np.ndarray:
    """A drawing on a canvas of whole patches: (h·32, w·32, 4), colours premultiplied in −1…1, cover in 0…1."""
    width, height = (math.ceil((2 * corner + pose.side) / PATCH) * PATCH for corner in (pose.left, pose.top))
    drawing = render(thing, pose, width, height)
    cover = drawing[..., 3:]
    return np.concatenate([(2 * drawing[..., :3] - 1) * cover, cover], axis=-1)


def principal_components(channels: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Principal components of the pictures' patches.

    Returns:
        The mean patch (3·32·32), the leading components (channels, 3·32·32) and their standard deviations (channels).
    """
    rng = random.Random(seed)
    total, mean, moment = 0, torch.zeros(()), torch.zeros(())  # broadcast
    for thing in tqdm(THINGS, desc="principal components"):
        for style in (BASE, BASE, STYLE):
            pose = rng.choice(poses(thing))
            drawing = torch.from_numpy(draw_pose(thing, pose))
            colour = 2 * torch.tensor(background(style, rng.choice(list(BACKGROUNDS)))) - 1
            picture = drawing[..., :3] + (1 - drawing[..., 3:]) * colour
            patches = _patches(picture).double()
            total += len(patches)
            mean = mean + patches.sum(0)
            moment = moment + patches.T @ patches
    mean = mean / total
    values, vectors = torch.linalg.eigh(moment / total - torch.outer(mean, mean))
    order = torch.arange(len(values) - 1, len(values) - 1 - channels, -1)
    return mean.float(), vectors[:, order].T.float().contiguous(), values[order].clamp(min=0).sqrt().float()


def linear_autoencoder(amplitude: float) -> PatchAutoencoder:
    """An autoencoder whose latents are principal components, scaled by the square root of their deviation.

    Full whitening would make the many faint components as loud as the few that carry the picture; none would leave
    them in the noise until the last steps.
    """
    mean, components, deviations = principal_components(CHANNELS)
    scale = (deviations / deviations[0]).sqrt() * amplitude / deviations
    autoencoder: PatchAutoencoder = PatchAutoencoder(**AUTOENCODER)
    with torch.no_grad():
        analysis = components * scale[:, None]
        autoencoder.analysis.weight.copy_(analysis.view(CHANNELS, 3, PATCH, PATCH))
        autoencoder.analysis.get_parameter("bias").copy_(-analysis @ mean)
        autoencoder.synthesis.weight.copy_((components / scale[:, None]).view(CHANNELS, 3, PATCH, PATCH))
        autoencoder.synthesis.get_parameter("bias").copy_(mean.view(3, -1).mean(1))
    return autoencoder


class Album:
    """Codes of every thing in many poses, and pictures made of them."""

    def __init__(self, codes: dict[str, list[Code]], autoencoder: PatchAutoencoder) -> None:
        """Take codes by thing, as `collect` makes them, and the autoencoder that they were made with."""
        self._codes = codes
        weight = autoencoder.analysis.weight.detach()
        self._constant: Tensor = autoencoder.analysis.get_parameter("bias").detach()
        self._colour = weight.sum((2, 3)).T  # (3, C): what each colour channel adds to a plain patch

    def picture(self, style: str, thing: str, colour: str, rows: int, columns: int, place: tuple[int, int]) -> Tensor:
        """Latents (C, rows, columns) of a thing on a plain background, in one of `PLACES`."""
        shorter = PATCH * min(rows, columns)
        codes = self._codes[thing]
        small = min(codes[: len(SMALL_SIDES)], key=lambda code: abs(code.side - 0.72 * shorter))
        code = small if shorter < SMALL_CANVAS else codes[-1]
        height, width = code.colours.shape[:2]
        rgb = 2 * torch.tensor(background(style, colour)) - 1
        latents = (self._constant + rgb @ self._colour).repeat(rows, columns, 1)
        top, left = _offset(rows, height, place[0]), _offset(columns, width, place[1])
        into = latents[max(top, 0) : top + height, max(left, 0) : left + width]
        here = slice(max(-top, 0), max(-top, 0) + into.shape[0]), slice(max(-left, 0), max(-left, 0) + into.shape[1])
        into += code.colours[here].float()
        into -= torch.einsum("c,chwk->hwk", rgb, code.cover[(slice(None), *here)].float())
        return latents.permute(2, 0, 1)


def collect(autoencoder: PatchAutoencoder, workers: int = 2) -> dict[str, list[Code]]:
    """Render and encode every thing in each of its poses."""
    weight = autoencoder.analysis.weight.detach()
    with ProcessPoolExecutor(workers) as pool:
        codes = tqdm(pool.map(partial(encode, weight), THINGS), "drawings", total=len(THINGS))
        return dict(zip(THINGS, codes, strict=True))


def encode(weight: Tensor, thing: str) -> list[Code]:
    """Render one thing in each of its poses, and encode it; on one thread."""
    torch.set_num_threads(1)
    codes = []
    for pose in poses(thing):
        drawing = torch.from_numpy(draw_pose(thing, pose))
        rows, columns = (length // PATCH for length in drawing.shape[:2])
        colours = _patches(drawing[..., :3]) @ weight.flatten(1).T
        cover = torch.stack([_patches(drawing[..., 3:]) @ weight[:, c].flatten(1).T for c in range(3)])
        codes.append(Code(pose.side, colours.view(rows, columns, -1).half(), cover.view(3, rows, columns, -1).half()))
    return codes


def _patches(picture: Tensor) -> Tensor:
    """(h·32, w·32, channels) -> (h·w, channels·32·32)."""
    rows, columns = (length // PATCH for length in picture.shape[:2])
    patches = picture.view(rows, PATCH, columns, PATCH, -1).permute(0, 2, 4, 1, 3)
    return patches.reshape(rows * columns, -1)


def _offset(outer: int, inner: int, further: int) -> int:
    """Where a drawing begins on the canvas: near the middle, so many patches further where there is room.

    Canvases of most sizes share a beginning, a multiple of `STRIDE`: a network that knows a place by its distance to
    the first token learns a drawing sooner where it seldom moves.
    """
    room = outer - inner
    begin = STRIDE * round(room / 2 / STRIDE) + further
    return min(max(begin, 0), room // GRID * GRID) if room > 0 else GRID * round(room / 2 / GRID)
