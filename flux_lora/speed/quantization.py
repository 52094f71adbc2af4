"""Linear layers in eight bits, whose weights can still be changed in place.

    layers = prepare(transformer, "fp8")

turns the linear layers of the repeated blocks into `QuantizedLinear`: weights with one scale for each output row,
activations with one scale for each token, found anew in every call. The layers that make the blocks' modulations from
timestep and guidance stay as they are: they act on every token alike, and are 0.02 % of the operations.

`write_rows` quantizes float32 rows into the tensors that compiled code already holds. So an adapter is merged into the
full-precision weights first, and rounded once, to the nearest of the scheme's numbers.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

Scheme = Literal["fp8"]


@dataclass(frozen=True)
class Format:
    """Numbers of eight bits."""

    dtype: torch.dtype
    largest: float


FORMATS: dict[Scheme, Format] = {"fp8": Format(torch.float8_e4m3fn, 448.0)}

SMALLEST = 2.0**-100
"""What a token's largest value is taken for at least: so the inverse of it is finite, and a token of zeros is one."""

ALIGNMENT = 16
"""Both sides of a weight must be multiples of it: what GPUs' eight-bit products ask for."""

MODULATIONS = ("norm", "norm1", "norm1_context")
"""Submodules of FLUX.1's blocks that make modulations."""


class QuantizedLinear(nn.Module):
    """x (…, in) -> (…, out) as `torch.nn.Linear`, by a product of eight-bit numbers.

    On a CUDA device that product is the hardware's own (compute capability 8.9 and later), elsewhere it is computed in
    float32 from the same eight-bit numbers.
    """

    values: Tensor
    """(out, in) in eight bits."""
    scales: Tensor
    """(out,), float32: the weight is values · scales for each row."""

    def __init__(self, linear: nn.Linear, scheme: Scheme, device: torch.device | None = None) -> None:
        """Take a layer's place with weights of its shape; they hold nothing until `write_rows` has filled them.

        Args:
            linear: the layer.
            scheme: a key of `FORMATS`.
            device: where the weights are to be; None: where the layer's are.
        """
        super().__init__()
        self.scheme: Scheme = scheme
        self.format = FORMATS[scheme]
        self.dtype = linear.weight.dtype
        self.shape = linear.weight.shape
        self.move(device or linear.weight.device)
        self.bias = linear.bias

    def move(self, device: torch.device) -> None:
        """Take other memory, which holds nothing yet; on ``meta``, none."""
        self.register_buffer("values", torch.empty(self.shape, dtype=self.format.dtype, device=device))
        self.register_buffer("scales", torch.ones(self.shape[0], device=device))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.values.device

    @torch.no_grad()
    def write_rows(self, start: int, stop: int, rows: Tensor) -> None:
        """Quantize rows [start, stop) of the weight (stop − start, in) in place, each to its own scale."""
        rows = rows.to(self.device, torch.float32)
        scales = _scales(rows, self.format)
        self.scales[start:stop].copy_(scales.squeeze(1))
        self.values[start:stop].copy_(_rounded(rows, scales, self.format))

    def dequantized(self) -> Tensor:
        """The weight that the eight-bit numbers stand for, (out, in) in float32."""
        return self.values.float() * self.scales[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Quantize each token by itself and multiply."""
        return self.multiply(*quantize_tokens(x.float(), self.scheme), x.dtype)

    def multiply(self, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply tokens that `quantize_tokens` has quantized: values (…, in), scales (…, 1) -> (…, out)."""
        tokens = values.reshape(-1, values.shape[-1])
        product = hardware_product if values.is_cuda else emulated_product
        out = product(tokens, self.values, scales.reshape(-1, 1), self.scales, self.bias, dtype)
        return out.reshape(*values.shape[:-1], self.shape[0])


def quantize_tokens(x: Tensor, scheme: Scheme = "fp8") -> tuple[Tensor, Tensor]:
    """Tokens (…, n), float32, each with its own scale: values (…, n) in eight bits, and scales (…, 1) in float32.

    Values are x · (largest number / largest of the token): a GPU multiplies in a fraction of the time of a division.
    """
    numbers = FORMATS[scheme]
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=SMALLEST)
    return (x * (numbers.largest / largest)).to(numbers.dtype), largest / numbers.largest


def hardware_product(
    tokens: Tensor, weight: Tensor, token_scales: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Tokens (n, in) · weight (out, in)ᵀ in eight bits, scaled by (n, 1) and (out,), plus bias: (n, out)."""
    out: Tensor = torch._scaled_mm(  # noqa: SLF001 - the public name has no kernel in Inductor
        tokens, weight.t(), scale_a=token_scales, scale_b=scales[None], bias=bias, out_dtype=dtype, use_fast_accum=True
    )
    return out


def emulated_product(
    tokens: Tensor, weight: Tensor, token_scales: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The same in float32, in which the products of eight-bit numbers are exact."""
    out = F.linear(tokens.float(), weight.float()) * token_scales * scales
    return (out if bias is None else out + bias).to(dtype)


def prepare(transformer: nn.Module, scheme: Scheme) -> dict[str, QuantizedLinear]:
    """Replace the repeated blocks' linear layers by quantized ones that have no memory yet.

    Args:
        transformer: a FluxTransformer2DModel.
        scheme: a key of `FORMATS`.

    Returns:
        The quantized layers by the names of the weights that they stand for.
    """
    for name in quantizable(transformer):
        layer: Any = transformer.get_submodule(name)
        transformer.set_submodule(name, QuantizedLinear(layer, scheme, torch.device("meta")))
    return quantized_layers(transformer)


def quantized_layers(module: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized layers by the names of the weights that they hold: ``….to_q.weight``."""
    return {f"{name}.weight": layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)}


def quantizable(transformer: nn.Module) -> list[str]:
    """The names of the layers that `prepare` replaces."""
    return [name for name, layer in transformer.named_modules() if _is_quantizable(name, layer)]


def _is_quantizable(name: str, layer: nn.Module) -> bool:
    path = name.split(".")
    return (
        isinstance(layer, nn.Linear)
        and path[0] in ("transformer_blocks", "single_transformer_blocks")
        and not set(path) & set(MODULATIONS)
        and layer.in_features % ALIGNMENT == layer.out_features % ALIGNMENT == 0
    )


def _scales(rows: Tensor, numbers: Format) -> Tensor:
    """(n, 1): what maps the largest of each row to the largest number; 1 for a row of zeros."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    return torch.where(largest > 0, largest / numbers.largest, 1.0)


def _rounded(rows: Tensor, scales: Tensor, numbers: Format) -> Tensor:
    return (rows / scales).clamp(-numbers.largest, numbers.largest).to(numbers.dtype)
