"""Previews: the map to colours against what the autoencoder itself decodes, and the noise that is taken away."""

import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from flux_lora.checkpoint.patch_autoencoder import PatchAutoencoder
from flux_lora.drawing.preview import CELLS, FLUX_COLOURS, colours_of, towards


def test_the_miniature_s_map_is_the_mean_of_what_is_decoded() -> None:
    torch.manual_seed(0)
    # A new one's smoothing network adds nothing yet, so that decoding is its linear part alone.
    vae = PatchAutoencoder(latent_channels=12, scaling_factor=0.7, shift_factor=0.3)
    latents = torch.randn(1, 12, 6, 9)
    decoded = vae.decode(latents / 0.7 + 0.3).sample.detach()
    colours = colours_of(vae)
    assert colours is not None
    side = decoded.shape[-1] // 9 // CELLS
    torch.testing.assert_close(colours.of(latents), F.avg_pool2d(decoded, side)[0], rtol=1e-4, atol=1e-5)


def test_flux_s_own_autoencoder_has_a_map_and_others_have_none() -> None:
    colours = colours_of(AutoencoderKL(latent_channels=16, block_out_channels=(32,)))
    assert colours is not None
    black = colours.of(torch.zeros(1, 16, 2, 3))
    assert black.shape == (3, 2, 3)
    torch.testing.assert_close(black[:, 0, 0], torch.tensor((-0.0329, -0.0718, -0.0851)))
    one = torch.zeros(1, 16, 1, 1)
    one[0, 4] = 1
    torch.testing.assert_close((colours.of(one) - black[:, :1, :1]).flatten(), torch.tensor(FLUX_COLOURS[4]))
    assert colours_of(AutoencoderKL(latent_channels=4, block_out_channels=(32,))) is None


def test_what_a_straight_line_leads_to_is_found_on_all_of_it() -> None:
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(1, 12, 4, 4, generator=generator) for _ in range(2))
    for level in (0.9, 0.5, 0.0):
        torch.testing.assert_close(towards((1 - level) * image + level * noise, noise, level), image, rtol=0, atol=1e-5)
