"""Query, key and value by one product instead of three, where that is faster.

The weights of the three are made to lie behind one another in memory, so that they are also the rows of a single one:
what is merged into a part is merged into the whole, and nothing is held twice.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from flux_lora.speed import fastest
from flux_lora.speed.quantization import QuantizedLinear, Scheme

TRIPLES = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
"""diffusers' names of a fused projection, and of its parts."""

CANDIDATES = {"cuda": ("separate", "fused"), "cpu": ("separate",)}


class Fused(nn.Module):
    """x (…, in) -> (…, out) as `torch.nn.Linear`, by weights that are also those of several layers."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        """Take layers of one shape, with biases, and make their weights lie behind one another."""
        super().__init__()
        self.register_buffer("weight", joined([layer.weight for layer in layers]), persistent=False)
        self.register_buffer("bias", joined([layer.bias for layer in layers]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply once."""
        return F.linear(x, self.weight, self.bias)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names of parameters, those that may be fused behind one another: so they need not be moved for it."""
    together: dict[str, list[str]] = {}
    for name in names:
        *path, layer, kind = ["", *name.split(".")]
        whole = next((whole for whole, parts in TRIPLES.items() if layer in parts), layer)
        together.setdefault(".".join([*path, whole, kind]), []).append(name)
    return tuple(name for group in together.values() for name in group)


def fuse(transformer: nn.Module) -> None:
    """Compute query, key and value of all attention as one, from the weights that the layers have now."""
    for attention, triples in _attentions(transformer):
        for whole, layers in triples.items():
            setattr(attention, whole, _join(layers))
        attention.fused_projections = True


def separate(transformer: nn.Module) -> None:
    """Compute them one by one again; the memory of the whole is the parts' alone."""
    for attention, triples in _attentions(transformer):
        attention.fused_projections = False
        for whole in triples:
            if hasattr(attention, whole):
                delattr(attention, whole)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One tensor whose rows are those of contiguous ``parts`` (n, …), which are views of it from now on."""
    first, size = parts[0], parts[0].numel()
    neighbours = all(
        part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and part.storage_offset() == first.storage_offset() + index * size
        for index, part in enumerate(parts)
    )
    if neighbours:
        return first.detach().as_strided((len(parts) * first.shape[0], *first.shape[1:]), first.stride())
    whole = torch.cat([part.detach() for part in parts])
    for part, rows in zip(parts, whole.chunk(len(parts)), strict=True):
        part.data = rows
    return whole


def choose_projection(
    transformer: Any, tokens: int, scheme: Scheme | None, device: torch.device, folder: Path
) -> tuple[str, bool]:
    """Decide whether query, key and value are faster ``separate`` or ``fused``, and whether that was measured just now.

    Args:
        transformer: a FluxTransformer2DModel; it is not changed.
        tokens: of text and image together.
        scheme: how its layers are quantized, if they are.
        device: computes.
        folder: a cache directory.
    """
    width, dtype = transformer.inner_dim, transformer.x_embedder.weight.dtype
    shape = {"tokens": tokens, "width": width, "dtype": str(dtype), "scheme": scheme}

    def measure(name: str) -> float:
        return time_projection(name, tokens, width, dtype, scheme, device)

    return fastest.choose_fastest("projections", CANDIDATES[device.type], shape, device, folder, measure)


@torch.no_grad()
def time_projection(
    name: str, tokens: int, width: int, dtype: torch.dtype, scheme: Scheme | None, device: torch.device
) -> float:
    """Seconds of a block's three projections, ``separate`` or ``fused``; only quantized ones gain by being compiled."""
    rows = {"separate": width, "fused": 3 * width}[name]
    layers = [_linear(width, rows, dtype, scheme, device) for _ in range(3 * width // rows)]
    x = torch.randn(1, tokens, width, dtype=dtype, device=device)

    def project(x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in layers]

    call: Callable[[Tensor], object] = torch.compile(project) if scheme else project
    call(x)
    return fastest.time_call(lambda: call(x), device)


def _attentions(transformer: nn.Module) -> Iterator[tuple[Any, dict[str, list[Any]]]]:
    for module in transformer.modules():
        if hasattr(module, "fused_projections") and hasattr(module, "to_q"):
            triples = {
                whole: [getattr(module, part) for part in parts]
                for whole, parts in TRIPLES.items()
                if getattr(module, parts[0], None) is not None
            }
            yield module, triples


def _join(layers: list[Any]) -> nn.Module:
    if not isinstance(layers[0], QuantizedLinear):
        return Fused(layers)
    rows, columns = layers[0].shape
    empty = nn.Linear(columns, len(layers) * rows, bias=False, dtype=layers[0].dtype, device="meta")
    whole = QuantizedLinear(empty, layers[0].scheme)
    del whole.bias
    for name in ("values", "scales", "bias"):
        whole.register_buffer(name, joined([getattr(layer, name) for layer in layers]), persistent=False)
    return whole


def _linear(width: int, rows: int, dtype: torch.dtype, scheme: Scheme | None, device: torch.device) -> nn.Module:
    linear = nn.Linear(width, rows, dtype=dtype, device=device)
    if not scheme:
        return linear
    layer = QuantizedLinear(linear, scheme)
    layer.write_rows(0, rows, linear.weight)
    return layer
