"""The attention kernel: the fastest at hand that computes right, measured once for each device and software version.

Kernels have diffusers' names. Those that are not installed, do not run on the device, cannot be part of compiled code,
or compute something else are no candidates. What was chosen is kept in a file and taken again, because another kernel
rounds differently.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from flux_lora import devices
from flux_lora.quiet import diffusers

DEFAULT = "native"
"""What PyTorch chooses by itself."""

EXACT = {
    "cuda": (DEFAULT, "_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3"),
    "cpu": (DEFAULT,),
}
"""Kernels that compute in the type of their inputs; FlashAttention 2 and 3 where their packages are installed."""

QUANTIZED = {"cuda": ("sage", "_sage_qk_int8_pv_fp8_cuda_sm90"), "cpu": ()}
"""SageAttention's, where it is installed: products of eight-bit numbers."""

MAX_ERROR = 0.05
"""Largest ‖out − exact‖ / ‖exact‖ on normal noise; bfloat16 kernels are at 0.003, eight-bit ones below 0.05."""

UNUSABLE = (RuntimeError, ImportError, ValueError, TypeError, AttributeError, KeyError)
"""What kernels raise that are not installed, or that the device has not."""

PACKAGES = ("torch", "diffusers", "flash-attn", "flash-attn-3", "sageattention")


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
    name, measured = choose(candidates, shape, device, folder)
    for transformer in transformers:
        with diffusers.attention_backend(DEFAULT):  # or the name would count for every model in this process
            transformer.set_attention_backend(name)
    return name, measured


def choose(
    candidates: tuple[str, ...],
    shape: Shape,
    device: torch.device,
    folder: Path,
    measure: Callable[[str, Shape, torch.device], float | None] | None = None,
) -> tuple[str, bool]:
    """The fastest candidate, from the file of an earlier choice if there is one; and whether it was measured just now.

    Args:
        candidates: names; a single one is taken without measuring.
        shape: what is measured.
        device: where.
        folder: where choices are kept.
        measure: seconds of a candidate, None when it cannot be used; `seconds` by default.
    """
    if len(candidates) == 1:
        return candidates[0], False
    key = {"device": devices.describe(device), **asdict(shape), "candidates": candidates, **_versions()}
    file = folder / f"attention-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        if (known := json.loads(file.read_text())["kernel"]) in candidates:
            return str(known), False
    timed = {name: (measure or seconds)(name, shape, device) for name in candidates}
    usable = {name: spent for name, spent in timed.items() if spent is not None}
    name = min(usable, key=lambda candidate: usable[candidate], default=DEFAULT)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(".part")
        unfinished.write_text(json.dumps({"kernel": name, "seconds": timed, "key": key}, indent=2) + "\n")
        unfinished.replace(file)
    return name, True


@torch.no_grad()
def seconds(name: str, shape: Shape, device: torch.device, rounds: int = 20) -> float | None:
    """Seconds of a call of a kernel, None when it cannot be used here or computes something else."""
    generator = torch.Generator("cpu").manual_seed(0)
    size = (3, 1, shape.tokens, shape.heads, shape.width)
    inputs = torch.randn(size, generator=generator).to(device, getattr(torch, shape.dtype))
    query, key, value = inputs
    try:
        with diffusers.attention_backend(name):  # asks for its package
            backend = diffusers.AttentionBackendName(name)
        attend = torch.compile(_attend, fullgraph=True, backend="eager")  # what cannot be traced fails here
        if _error(attend(query, key, value, backend), inputs.float()) > MAX_ERROR:
            return None
        _wait(device)
        started = time.perf_counter()
        for _ in range(rounds):
            attend(query, key, value, backend)
        _wait(device)
    except UNUSABLE:
        return None
    return (time.perf_counter() - started) / rounds


def _attend(query: Tensor, key: Tensor, value: Tensor, backend: Any) -> Tensor:
    out: Tensor = diffusers.models.attention_dispatch.dispatch_attention_fn(query, key, value, backend=backend)
    return out


def _error(out: Tensor, inputs: Tensor) -> float:
    """Distance to attention in float32, of the first head: (1, tokens, heads, width) each."""
    query, key, value = (part[:, :, :1].transpose(1, 2) for part in inputs)
    exact = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    return float((out[:, :, :1].float() - exact).norm() / exact.norm())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _versions() -> Mapping[str, str]:
    found = {"cuda": str(torch.version.cuda)}
    found["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
