import itertools

import pytest
import torch
from torch import Tensor

from flux_lora.checkpoint.patch_autoencoder import PatchAutoencoder
from training import album
from training.networks import AUTOENCODER
from training.styles import BASE, STYLE, background
from training.subjects import THINGS


@pytest.fixture(scope="module")
def autoencoder() -> PatchAutoencoder:
    torch.manual_seed(0)
    made: PatchAutoencoder = PatchAutoencoder(**AUTOENCODER).requires_grad_(False)
    return made


@pytest.fixture(scope="module")
def cats(autoencoder: PatchAutoencoder) -> album.Album:
    """An album of one thing."""
    return album.Album({"cat": album.encode(autoencoder.analysis.weight, "cat")}, autoencoder)


@pytest.mark.parametrize("style", [BASE, STYLE])
@pytest.mark.parametrize("place", album.PLACES)
@pytest.mark.parametrize("size", [(18, 18), (32, 40), (12, 16)])
def test_a_picture_made_of_codes_has_the_latents_of_the_rendered_picture(
    size: tuple[int, int], place: tuple[int, int], style: str, autoencoder: PatchAutoencoder, cats: album.Album
) -> None:
    """Somewhere: the place is searched for by the drawing alone, and then the whole picture is compared."""
    latents = cats.picture(style, "cat", "teal", *size, place)
    behind = 2 * torch.tensor(background(style, "teal")) - 1
    rows, columns = size
    best = torch.inf
    for pose in album.poses("cat"):
        drawing = torch.from_numpy(album.draw_pose("cat", pose))
        height, width = (length // album.PATCH for length in drawing.shape[:2])
        pixels = drawing[..., :3] + (1 - drawing[..., 3:]) * behind
        alone = encoded(autoencoder, pixels)
        places = itertools.product(range(0, rows - height + 1, album.GRID), range(0, columns - width + 1, album.GRID))
        for top, left in places:
            if (latents[:, top : top + height, left : left + width] - alone).abs().max() < 5e-3:
                canvas = behind.repeat(rows * album.PATCH, columns * album.PATCH, 1)
                here = canvas[top * album.PATCH :, left * album.PATCH :][: len(drawing), : drawing.shape[1]]
                here.copy_(pixels)
                best = min(best, (latents - encoded(autoencoder, canvas)).abs().max().item())
    assert best < 5e-3  # codes are kept in float16


def encoded(autoencoder: PatchAutoencoder, pixels: Tensor) -> Tensor:
    """Latents (C, h, w) of pixels (height, width, 3)."""
    latents: Tensor = autoencoder.encode(pixels.permute(2, 0, 1)[None]).latents[0]
    return latents


def test_the_two_places_are_a_token_apart_in_height_and_two_in_width(cats: album.Album) -> None:
    lower, righter = (cats.picture(BASE, "cat", "teal", 32, 32, place) for place in album.PLACES)
    assert torch.equal(lower.roll((-album.GRID, 2 * album.GRID), (1, 2)), righter)
    assert not torch.equal(lower, righter)


def test_every_thing_has_a_drawing() -> None:
    assert len(THINGS) >= 100
    for thing in THINGS:
        cover = album.draw_pose(thing, album.poses(thing)[0])[..., 3]
        assert 0.02 < cover.mean() < 0.95, thing
