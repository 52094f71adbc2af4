import pytest
import torch
from diffusers import FluxPipeline
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from flux_lora.drawing.latents import crop_centre, drawable, initial_noise, pack, unpack


def test_noise_is_what_the_field_draws_from_a_seed() -> None:
    expected = torch.randn((1, 4, 6, 10), generator=torch.Generator("cpu").manual_seed(7))
    assert torch.equal(initial_noise(7, 4, 6, 10), expected)
    assert not torch.equal(initial_noise(8, 4, 6, 10), expected)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**63 - 1])
def test_every_seed_of_the_contract_is_drawn(seed: int) -> None:
    noise = initial_noise(seed, 16, 32, 32)
    assert abs(noise.mean()) < 0.05
    assert abs(noise.std() - 1) < 0.05


def test_packing_is_that_of_diffusers() -> None:
    latents = torch.randn(1, 16, 6, 10)
    tokens = pack(latents)
    theirs = FluxPipeline._pack_latents(latents, 1, 16, 6, 10)  # noqa: SLF001 - what ours has to equal
    assert torch.equal(tokens, theirs)
    assert torch.equal(unpack(tokens, 6, 10), latents)


@given(st.integers(256, 1536), st.sampled_from([16, 32, 64]))
def test_drawable_is_the_next_multiple(size: int, grid: int) -> None:
    assert size <= drawable(size, grid) < size + grid
    assert drawable(size, grid) % grid == 0


def test_crop_takes_the_centre() -> None:
    image = Image.new("RGB", (64, 48))
    image.putpixel((32, 24), (255, 0, 0))
    assert crop_centre(image, 32, 16).getpixel((16, 8)) == (255, 0, 0)
    assert crop_centre(image, 32, 16).size == (32, 16)
    assert crop_centre(image, 64, 48) is image
