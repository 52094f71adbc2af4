"""Decoding and encoding with half of the memory: the VAE's blocks strip by strip, without seams.

Tiles that are decoded by themselves and blended, as diffusers does it, have seams, since each is normalized by its own
statistics. Here each layer is computed for the whole image before the next one; only its temporary tensors are of
strips: the normalized input, with the rows beyond its edges that a convolution reads. What a block computes is written
over what it has read.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

BLOCKS = {"decoder": ("up_blocks", "UpDecoderBlock2D"), "encoder": ("down_blocks", "DownEncoderBlock2D")}
"""What the halves of diffusers' AutoencoderKL are made of."""

STRIP_ROWS = 32
"""Rows that are computed at a time."""


def decode(vae: Any, latents: Tensor) -> Tensor:
    """The pixels (1, 3, H, W) in −1…1 of latents, as ``vae.decode`` gives them up to rounding.

    A VAE of another build than FLUX.1's decodes whole.
    """
    if not _is_known(vae, "decoder"):
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return pixels
    decoder = vae.decoder
    if getattr(vae, "post_quant_conv", None) is not None:
        latents = vae.post_quant_conv(latents)
    hidden = decoder.mid_block(decoder.conv_in(latents))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = _residual(resnet, hidden)
        for upsampler in block.upsamplers or ():
            hidden = _doubled(upsampler, hidden)
    return _convolved(decoder.conv_out, hidden, decoder.conv_norm_out)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """The latents (1, C, H/8, W/8) of pixels in −1…1, as the mean of what ``vae.encode`` gives, up to rounding.

    A VAE of another build than FLUX.1's encodes whole.
    """
    if not _is_known(vae, "encoder"):
        return mean(vae.encode(pixels, return_dict=False)[0])
    encoder = vae.encoder
    hidden = _convolved(encoder.conv_in, pixels, None)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            hidden = _residual(resnet, hidden)
        for downsampler in block.downsamplers or ():
            hidden = _halved(downsampler.conv, hidden)
    moments = _convolved(encoder.conv_out, encoder.mid_block(hidden), encoder.conv_norm_out)
    if getattr(vae, "quant_conv", None) is not None:
        moments = vae.quant_conv(moments)
    return moments.chunk(2, dim=1)[0]


def mean(encoded: Any) -> Tensor:
    """What a VAE has encoded: latents, or the mean of a distribution of them."""
    return encoded if isinstance(encoded, Tensor) else encoded.mode()


def _is_known(vae: Any, half: str) -> bool:
    blocks, kind = BLOCKS[half]
    return {type(block).__name__ for block in getattr(getattr(vae, half, None), blocks, ())} == {kind}


def _residual(block: Any, hidden: Tensor) -> Tensor:
    """Add what a residual block computes to its input, in the memory of the input where it fits."""
    inner = _convolved(block.conv1, hidden, block.norm1)
    norm = _Norm(block.norm2, inner)
    channels = block.conv2.out_channels
    out = hidden[:, :channels] if channels <= hidden.shape[1] else hidden.new_empty(1, channels, *hidden.shape[2:])
    for start in range(0, hidden.shape[2], STRIP_ROWS):
        rows = slice(start, start + STRIP_ROWS)
        before = hidden[:, :, rows]
        if block.conv_shortcut is not None:
            before = block.conv_shortcut(before)
        out[:, :, rows] = (before + _strip(block.conv2, inner, start, norm)) / block.output_scale_factor
    return out


def _doubled(upsampler: Any, hidden: Tensor) -> Tensor:
    """Twice as many rows and columns, then a convolution."""
    return _convolved(upsampler.conv, hidden, None, scale=2)


def _halved(conv: nn.Conv2d, hidden: Tensor) -> Tensor:
    """Half as many rows and columns, by a 3×3 convolution of stride 2 that reads one row and column beyond the end."""
    rows, columns = hidden.shape[2] // 2, hidden.shape[3] // 2
    out = hidden.new_empty(1, conv.out_channels, rows, columns)
    for start in range(0, rows, STRIP_ROWS):
        stop = min(start + STRIP_ROWS, rows)
        read = hidden[:, :, 2 * start : 2 * stop + 1]
        beyond = 2 * (stop - start) + 1 - read.shape[2]
        out[:, :, start:stop] = F.conv2d(F.pad(read, (0, 1, 0, beyond)), conv.weight, conv.bias, stride=2)
    return out


def _convolved(conv: nn.Conv2d, hidden: Tensor, norm: nn.GroupNorm | None, scale: int = 1) -> Tensor:
    normalize = None if norm is None else _Norm(norm, hidden)
    rows, columns = scale * hidden.shape[2], scale * hidden.shape[3]
    out = hidden.new_empty(1, conv.out_channels, rows, columns)
    for start in range(0, rows, STRIP_ROWS):
        out[:, :, start : start + STRIP_ROWS] = _strip(conv, hidden, start, normalize, scale)
    return out


def _strip(conv: nn.Conv2d, hidden: Tensor, start: int, norm: "_Norm | None", scale: int = 1) -> Tensor:
    """Rows from ``start`` of a 3×3 convolution of the normalized or enlarged input."""
    rows = scale * hidden.shape[2]
    stop = min(start + STRIP_ROWS, rows)
    first, last = max(0, start - 1), min(rows, stop + 1)
    read = hidden[:, :, first // scale : -(-last // scale)]
    if norm is not None:
        read = F.silu(norm(read))
    if scale > 1:
        read = F.interpolate(read, scale_factor=float(scale), mode="nearest")
        read = read[:, :, first - first // scale * scale :][:, :, : last - first]
    padding = (1, 1, 1 if start == 0 else 0, 1 if stop == rows else 0)
    return F.conv2d(F.pad(read, padding), conv.weight, conv.bias)


class _Norm:
    """A group normalization by the statistics of the whole image, counted in float32 strip by strip."""

    def __init__(self, norm: nn.GroupNorm, hidden: Tensor) -> None:
        def total(of: Callable[[Tensor], Tensor]) -> Tensor:
            """Sum over each group, of strips (groups, values)."""
            starts = range(0, hidden.shape[2], STRIP_ROWS)
            strips = (hidden[:, :, start : start + STRIP_ROWS].reshape(norm.num_groups, -1) for start in starts)
            return torch.stack([of(strip.float()).sum(1) for strip in strips]).double().sum(0)

        count = hidden.numel() // norm.num_groups
        mean = (total(lambda strip: strip) / count)[:, None].float()
        variance = total(lambda strip: (strip - mean).square()) / count
        deviation = (variance + norm.eps).rsqrt().float()
        each = norm.num_channels // norm.num_groups
        self._factor = deviation.repeat_interleave(each) * norm.weight.float()
        self._shift = norm.bias.float() - mean[:, 0].repeat_interleave(each) * self._factor

    def __call__(self, rows: Tensor) -> Tensor:
        factor, shift = self._factor[None, :, None, None], self._shift[None, :, None, None]
        return torch.addcmul(shift, rows.float(), factor).to(rows.dtype)
