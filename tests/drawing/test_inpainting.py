"""Masks by themselves: what counts as white, which latents are drawn, and what is pasted back."""

import numpy as np
import pytest
import torch
from PIL import Image

from flux_lora.drawing.inpainting import FEATHER, drawn_latents, is_white, paste, white

SIZE = (96, 64)


def mask(*boxes: tuple[int, int, int, int], value: int = 255) -> Image.Image:
    drawn = Image.new("L", SIZE, 0)
    for box in boxes:
        drawn.paste(value, box)
    return drawn


def test_white_begins_at_128() -> None:
    values = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    assert np.array_equal(np.asarray(white(values))[0], np.where(np.arange(256) >= 128, 255, 0))
    assert np.array_equal(np.asarray(white(mask((8, 8, 20, 20)).convert("1"))), np.asarray(mask((8, 8, 20, 20))))


@pytest.mark.parametrize(("drawn", "expected"), [(mask(), False), (mask((0, 0, 96, 64), value=128), True)])
def test_a_mask_is_white_when_all_of_it_is(drawn: Image.Image, expected: bool) -> None:
    assert is_white(drawn) == expected
    nearly = drawn.copy()
    nearly.putpixel((95, 63), 127)
    assert not is_white(nearly)


def test_latents_are_drawn_of_which_any_pixel_is_white() -> None:
    latents = drawn_latents(mask((15, 8, 17, 9)), side=8)
    assert latents.dtype == torch.bool
    assert latents.shape == (1, 1, 8, 12)
    assert latents.nonzero()[:, 2:].tolist() == [[1, 1], [1, 2]]


def test_what_is_kept_fades_out_within_the_white_part() -> None:
    """Along a line into the white part, by hand: a fifth more of what was drawn with each pixel."""
    kept, drawn = Image.new("RGB", SIZE, (0, 50, 100)), Image.new("RGB", SIZE, (100, 50, 0))
    line = np.asarray(paste(drawn, kept, mask((40, 0, 96, 64))))[30].astype(int)
    assert (line[:40] == (0, 50, 100)).all()
    assert FEATHER == 4
    assert line[40:45, 0].tolist() == [20, 40, 60, 80, 100]
    assert (line[44:] == (100, 50, 0)).all()  # and up to the picture's own edge, which is no edge of the mask


def test_paste_is_exact_for_every_colour() -> None:
    random = np.random.default_rng(0)
    kept, drawn = (Image.fromarray(random.integers(0, 256, (*SIZE[::-1], 3), np.uint8)) for _ in range(2))
    within = Image.fromarray(random.integers(0, 2, SIZE[::-1], np.uint8) * 255)
    pasted = np.asarray(paste(drawn, kept, within))
    black = np.asarray(within) == 0
    assert np.array_equal(pasted[black], np.asarray(kept)[black])
    large = mask((0, 0, 96, 64))
    assert np.array_equal(np.asarray(paste(drawn, kept, large)), np.asarray(drawn))
    assert np.array_equal(np.asarray(paste(drawn, kept, mask())), np.asarray(kept))
