"""The miniature's VAE: a linear code of square patches, and a small network that smooths what it decodes.

Each patch of pixels is one latent pixel whose channels are its principal components, so a picture's latents are a
linear function of its pixels. Decoding is the transposed map, then a residual network that sees across the patches'
borders, which principal components know nothing of.
"""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it


class PatchAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """An autoencoder with the interface of diffusers' ``AutoencoderTiny``: no distribution, one latent for an image.

    Images are (B, 3, H, W) in −1…1 with H and W multiples of the patch, latents (B, latent_channels, H/patch, W/patch).
    """

    config_name = "config.json"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_channels: int = 32,
        block_out_channels: tuple[int, ...] = (32, 32, 32, 32, 32, 32),
        smoothing_blocks: int = 3,
        smoothing_stride: int = 8,
        scaling_factor: float = 1.0,  # noqa: ARG002 - read from the configuration
        shift_factor: float = 0.0,  # noqa: ARG002
    ) -> None:
        """Make an autoencoder with random weights.

        Args:
            latent_channels: principal components that are kept of a patch.
            block_out_channels: pipelines read the patch's side from it, 2 to the power of its length less one; the
                last is the smoothing network's width.
            smoothing_blocks: residual blocks of the smoothing network.
            smoothing_stride: pixels a side that it sees as one.
            scaling_factor: pipelines divide latents by it before decoding …
            shift_factor: … and then add this.
        """
        super().__init__()
        patch, width = 2 ** (len(block_out_channels) - 1), block_out_channels[-1]
        pixels = 3 * smoothing_stride**2
        self.stride = smoothing_stride
        self.analysis = nn.Conv2d(3, latent_channels, patch, stride=patch)
        self.synthesis = nn.ConvTranspose2d(latent_channels, 3, patch, stride=patch)
        self.smooth_in = nn.Conv2d(pixels, width, 3, padding=1)
        self.smooth = nn.ModuleList(_Residual(width) for _ in range(smoothing_blocks))
        self.smooth_out = nn.Conv2d(width, pixels, 3, padding=1)
        nn.init.zeros_(self.smooth_out.weight)
        nn.init.zeros_(self.smooth_out.bias)  # type: ignore[arg-type]

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Turn images into latents."""
        latents = self.analysis(x)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(self, z: Tensor, generator: Any = None, return_dict: bool = True) -> Any:  # noqa: ARG002
        """Turn latents into images."""
        linear = self.synthesis(z)
        hidden = self.smooth_in(F.pixel_unshuffle(linear, self.stride))
        for block in self.smooth:
            hidden = block(hidden)
        image = linear + F.pixel_shuffle(self.smooth_out(F.silu(hidden)), self.stride)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> Any:
        """Encode and decode images."""
        return self.decode(self.encode(sample).latents, return_dict=return_dict)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.add(hidden, self.second(F.silu(self.first(F.silu(hidden)))))
