"""Pixels of the VAE as bytes."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from flux_lora.drawing.image import as_bytes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixels_are_rounded_as_diffusers_rounds_them(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Noise, what lies beyond −1 and 1, and all halves between two bytes, which go to the even one."""
    halves = torch.arange(-2, 514).div(255).sub(1).repeat(3, 1)[None, :, None, :]
    for pixels in (torch.randn(1, 3, 64, 40), halves):
        given = pixels.to(dtype, memory_format=layout)
        expected = np.asarray(VaeImageProcessor().postprocess(given)[0])
        kept = given.clone()
        found = as_bytes(given[0])
        assert (found.dtype, found.is_contiguous()) == (torch.uint8, True)
        assert np.array_equal(found.numpy(), expected)
        assert torch.equal(given, kept)
