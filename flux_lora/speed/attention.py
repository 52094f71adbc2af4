"""The attention kernel: the fastest at hand that computes right.

Kernels have diffusers' names. Those that are not installed, do not run on the device, cannot be part of compiled code,
or compute something else are no candidates.
"""

import importlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from flux_lora.device.libraries import diffusers
from flux_lora.speed import fastest

DEFAULT = "native"
"""What PyTorch chooses by itself."""

FLASH_4 = "flash_4_hub"
"""FlashAttention 4: diffusers would fetch it from the Hub, and here the package ``flash-attn-4`` computes it."""

EXACT = {
    "cuda": (DEFAULT, "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", FLASH_4),
    "cpu": (DEFAULT,),
}
"""Kernels that compute in the type of their inputs; FlashAttention 2, 3 and 4 where their packages are installed."""

QUANTIZED = {"cuda": ("sage", "_sage_qk_int8_pv_fp8_cuda_sm90"), "cpu": ()}
"""SageAttention's, where it is installed: products of eight-bit numbers."""

MAX_ERROR = 0.05
"""Largest ‖out − exact‖ / ‖exact‖ on normal noise; bfloat16 kernels are at 0.003, eight-bit ones below 0.05."""

UNUSABLE = (RuntimeError, ImportError, ValueError, TypeError, AttributeError, KeyError)
"""What kernels raise that are not installed, or that the device has not."""


@dataclass(frozen=True)
class Shape:
    """Of one attention call at batch one."""

    tokens: int
    heads: int
    width: int
    dtype: str


def set_fastest(
    transformers: Iterable[Any], tokens: int, device: torch.device, *, exact: bool, folder: Path
) -> tuple[str, bool]:
    """Let transformers use the fastest kernel for ``tokens`` tokens: its name, and whether it was measured just now.

    Args:
        transformers: FluxTransformer2DModels of one shape, wherever their weights are now.
        tokens: of text and image together.
        device: computes.
        exact: only kernels that compute in the model's own type.
        folder: a cache directory; where it cannot be written to, nothing is kept.
    """
    transformers = list(transformers)
    config = transformers[0].config
    dtype = str(transformers[0].x_embedder.weight.dtype).removeprefix("torch.")
    shape = Shape(tokens, config.num_attention_heads, config.attention_head_dim, dtype)
    candidates = (*EXACT[device.type], *(() if exact else QUANTIZED[device.type]))
    name, measured = fastest.choose_fastest(
        "attention", candidates, asdict(shape), device, folder, lambda name: time_kernel(name, shape, device)
    )
    for transformer in transformers:
        if name == FLASH_4:
            for processor in transformer.attn_processors.values():
                processor._attention_backend = _backend(name)  # noqa: SLF001 - diffusers' own way asks for the Hub's
            continue
        with diffusers.attention_backend(DEFAULT):  # or the name would count for every model in this process
            transformer.set_attention_backend(name)
    return name, measured


@torch.no_grad()
def time_kernel(name: str, shape: Shape, device: torch.device, rounds: int = 20) -> float | None:
    """Measure the seconds of a call of a kernel, None when it cannot be used here or computes something else."""
    generator = torch.Generator("cpu").manual_seed(0)
    size = (3, 1, shape.tokens, shape.heads, shape.width)
    inputs = torch.randn(size, generator=generator).to(device, getattr(torch, shape.dtype))
    query, key, value = inputs
    try:
        backend = _backend(name)
        attend = torch.compile(_attend, fullgraph=True, backend="eager")  # what cannot be traced fails here
        out = attend(query, key, value, backend)
    except UNUSABLE:
        return None
    if _error(out, inputs.float()) > MAX_ERROR:
        return None
    return fastest.time_call(lambda: attend(query, key, value, backend), device, rounds)


def _backend(name: str) -> Any:
    """Find diffusers' backend of a name; raises one of `UNUSABLE` where its package is missing."""
    backend = diffusers.AttentionBackendName(name)
    if name != FLASH_4:
        with diffusers.attention_backend(name):  # asks for its package
            return backend
    importlib.import_module("flash_attn.cute")
    registry = diffusers.models.attention_dispatch._AttentionBackendRegistry  # noqa: SLF001 - it has no other door
    registry._backends[backend] = _by_flash_4  # noqa: SLF001
    registry._supported_arg_names[backend] = {"query", "key", "value"}  # noqa: SLF001
    return backend


def _by_flash_4(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out: Tensor = _flash_4(query, key, value)
    return out


@torch.library.custom_op("flux_lora::flash_4", mutates_args=())
def _flash_4(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of (batch, tokens, heads, width) by the package, as one operator, so that it can be compiled around."""
    out = importlib.import_module("flash_attn.cute").flash_attn_func(query, key, value)
    attended: Tensor = out[0] if isinstance(out, tuple) else out  # some of its versions return more
    return attended.contiguous()


@_flash_4.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG001 - the operator's
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def _attend(query: Tensor, key: Tensor, value: Tensor, backend: Any) -> Tensor:
    out: Tensor = diffusers.models.attention_dispatch.dispatch_attention_fn(query, key, value, backend=backend)
    return out


def _error(out: Tensor, inputs: Tensor) -> float:
    """Distance to attention in float32, of the first head: (1, tokens, heads, width) each."""
    query, key, value = (part[:, :, :1].transpose(1, 2) for part in inputs)
    exact = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    return float((out[:, :, :1].float() - exact).norm() / exact.norm())
