"""Decoding in strips, against the whole: the same up to rounding, so without seams, where tiles have some."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, FluxPipeline

from flux_lora.checkpoint.patch_autoencoder import PatchAutoencoder
from flux_lora.drawing import image, strips


def autoencoder(**options: Any) -> Any:
    torch.manual_seed(0)
    channels = (16, 32, 48, 48)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        latent_channels=16,
        norm_num_groups=8,
        **options,
    )
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize("size", [(8, 8), (16, 24), (21, 13)])
@pytest.mark.parametrize("post_quant", [False, True])
def test_strips_are_the_whole_up_to_rounding(size: tuple[int, int], post_quant: bool) -> None:
    vae, latents = autoencoder(use_post_quant_conv=post_quant), torch.randn(1, 16, *size)
    whole = vae.decode(latents, return_dict=False)[0]
    in_strips = strips.decode(vae, latents)
    assert in_strips.shape == whole.shape == (1, 3, 8 * size[0], 8 * size[1])
    assert (in_strips - whole).abs().max() < 3e-5 * whole.abs().max()


def test_in_bfloat16_strips_are_as_exact_as_the_whole() -> None:
    """Both against the same weights in float64."""
    vae, latents = autoencoder().bfloat16(), torch.randn(1, 16, 24, 24).bfloat16()
    whole, in_strips = vae.decode(latents, return_dict=False)[0], strips.decode(vae, latents)
    exact = vae.double().decode(latents.double(), return_dict=False)[0]
    errors = [(pixels.double() - exact).square().mean().sqrt() for pixels in (in_strips, whole)]
    assert errors[0] < 1.05 * errors[1]


def test_there_is_no_seam_where_strips_meet() -> None:
    """The difference to the whole is no larger at the strips' borders; in diffusers' tiles it is thousands of times."""
    vae, latents = autoencoder(), torch.randn(1, 16, 32, 32)
    whole = vae.decode(latents, return_dict=False)[0]
    difference = (strips.decode(vae, latents) - whole).abs().amax((0, 1, 3))
    borders = torch.zeros(len(difference), dtype=torch.bool)
    for start in range(strips.STRIP_ROWS, len(difference), strips.STRIP_ROWS):
        borders[start - 2 : start + 2] = True
    assert difference[borders].mean() < 1.5 * difference[~borders].mean()
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 16, 128
    tiled = (vae.decode(latents, return_dict=False)[0] - whole).abs().max()
    assert tiled > 1000 * difference.max()


def test_the_latents_are_not_changed() -> None:
    vae, latents = autoencoder(), torch.randn(1, 16, 8, 8)
    before = latents.clone()
    strips.decode(vae, latents)
    assert torch.equal(latents, before)


def test_a_vae_of_another_build_decodes_whole() -> None:
    torch.manual_seed(0)
    vae, latents = AutoencoderTiny().eval().requires_grad_(False), torch.randn(1, 4, 8, 8)
    assert torch.equal(strips.decode(vae, latents), vae.decode(latents, return_dict=False)[0])


def test_the_patch_autoencoder_decodes_whole_when_strips_are_asked_for() -> None:
    torch.manual_seed(0)
    vae = PatchAutoencoder(scaling_factor=0.5, shift_factor=0.25).eval().requires_grad_(False)
    latents = torch.randn(1, 32, 3, 4)
    others = ("scheduler", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    pipeline = FluxPipeline(vae=vae, **dict.fromkeys(others))
    drawn = image.decode(pipeline, latents, (120, 90), in_strips=True)
    pixels = vae.decode(latents / 0.5 + 0.25).sample[0].permute(1, 2, 0)[3:93, 4:124]  # 96×128: the centre
    assert drawn.size == (120, 90)
    assert np.abs(np.asarray(drawn) - (127.5 * (pixels.clamp(-1, 1) + 1)).numpy()).max() <= 0.51
