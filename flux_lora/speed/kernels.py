"""Fused kernels for what lies between a FLUX.1 block's products: each reads a token's row once, and writes it once.

    join       [attention | GELU(mlp)], what the last product of a block takes
    modulate   LayerNorm · (1 + scale) + shift of text and image tokens, before or after out · gate is added to them
    rotate     RMSNorm and rotary embedding of query and key

Rounding points, on every device and however it is computed: within a kernel everything is float32, and each tensor that
it returns is rounded once, to its inputs' type; `modulate` normalizes the rounded sum. Where a kernel quantizes, the
float32 numbers are rounded to eight bits at once. That is what PyTorch's compiler makes of diffusers' blocks.

Each is a PyTorch operator, which compiled code takes as a whole. On a CUDA device with Triton it launches a program of
`programs`; elsewhere its reference here computes it, in plain PyTorch.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from math import log2, pi, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - PyTorch's own name for it

from flux_lora.speed.quantization import FORMATS, quantize_tokens

WARPS = {"join": 8, "modulate": 4, "rotate": 4}
"""Of 32 threads that compute a row: the fastest on an H100 (`benchmarks/kernels.py`)."""

CAPABILITY = (8, 0)
"""The first CUDA compute capability with bfloat16 (Ampere)."""

MOST_PARTS = 8
"""A row is computed in at most so many parts; one of another width in one, padded to a power of two."""

FP8 = FORMATS["fp8"].dtype

LIBRARY: Any = torch.library.Library("flux_lora", "DEF")


def _operator(shapes: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a function a PyTorch operator: without gradients, on every device.

    By the dispatcher's own interface, since the wrapper that `torch.library.custom_op` puts around takes four fifths of
    a call's time on the host.

    Args:
        shapes: takes the same arguments and returns tensors of the same sizes and orders, with nothing in them.
    """

    def register(function: Callable[..., Any]) -> Any:
        name = function.__name__
        schema = torch.library.infer_schema(function, mutates_args=())
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"flux_lora::{name}", shapes, lib=LIBRARY)
        return getattr(torch.ops.flux_lora, name).default

    return register


def _join_shapes(attention: Tensor | None, mlp: Tensor | None, quantized: bool) -> list[Tensor]:
    example = _one_of(attention, mlp)
    batch, tokens = example.shape[:2]
    width = attention.shape[2] * attention.shape[3] if attention is not None else 0
    return empty_rows(example, batch, tokens, width + (mlp.shape[2] if mlp is not None else 0), quantized)


@_operator(_join_shapes)
def join(attention: Tensor | None, mlp: Tensor | None, quantized: bool) -> list[Tensor]:
    """What a block's last product takes: [attention | GELU(mlp)], or one of the two alone.

    Args:
        attention: (batch, tokens, heads, width) in any order in memory but for the last dimension.
        mlp: (batch, tokens, features); its GELU is the one by tanh.
        quantized: also quantize.

    Returns:
        [rows (batch, tokens, heads · width + features)], or [values, scales (batch, tokens, 1)] of them in fp8.
    """
    example = _one_of(attention, mlp)
    if not launches(example):
        return join_reference(attention, mlp, quantized)
    batch, tokens = example.shape[:2]
    head = attention.shape[3] if attention is not None else 1
    width = attention.shape[2] * head if attention is not None else 0
    features = mlp.shape[2] if mlp is not None else 0
    strides = attention.stride() if attention is not None else (0, 0, 0, 1)
    if strides[3] != 1:
        raise ValueError("attention's last dimension must be contiguous")
    out = empty_rows(example, batch, tokens, width + features, quantized)
    launch(
        "join",
        (batch * tokens,),
        example,
        *(out if quantized else (out[0], None)),
        attention,
        mlp.contiguous() if mlp is not None else None,
        tokens,
        *strides[:3],
        HEAD=head,
        WIDTH=width,
        PART=part(width),
        MLP=features,
        MLP_PART=part(features),
        QUANTIZED=quantized,
    )
    return out


def join_reference(attention: Tensor | None, mlp: Tensor | None, quantized: bool) -> list[Tensor]:
    """`join` in plain PyTorch."""
    parts = [attention.flatten(2).float()] if attention is not None else []
    parts += [gelu(mlp.float())] if mlp is not None else []
    return _rounded(torch.cat(parts, dim=2), _one_of(attention, mlp).dtype, quantized)


def _modulate_shapes(
    tokens: Sequence[Tensor],
    scale: Sequence[Tensor],  # noqa: ARG001 - the operator's
    shift: Sequence[Tensor],  # noqa: ARG001
    out: Sequence[Tensor],
    gate: Sequence[Tensor],  # noqa: ARG001
    eps: float,  # noqa: ARG001
    quantized: bool,
) -> list[Tensor]:
    text, image = tokens
    batch, texts, width = text.shape
    sums = [text.new_empty(batch, texts + image.shape[1], width)] if out else []
    return sums + empty_rows(text, batch, texts + image.shape[1], width, quantized)


@_operator(_modulate_shapes)
def modulate(
    tokens: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    out: Sequence[Tensor],
    gate: Sequence[Tensor],
    eps: float,
    quantized: bool,
) -> list[Tensor]:
    """LayerNorm(tokens) · (1 + scale) + shift of text and image, joined; with ``out``, of tokens + gate · out.

    Args:
        tokens: text (batch, texts, width) and image (batch, images, width).
        scale: of text and of image, (batch, width) each.
        shift: likewise.
        out: to be added, as tokens; or empty.
        gate: its factor, as scale; or empty.
        eps: of the norm.
        quantized: also quantize.

    Returns:
        The sums (batch, texts + images, width), if there is anything to add; then rows of that shape, or their values
        and scales (batch, texts + images, 1) in fp8.
    """
    text, image = tokens
    if not launches(text):
        return modulate_reference(tokens, scale, shift, out, gate, eps, quantized)
    (batch, texts, width), images = text.shape, image.shape[1]
    text, image = _contiguous_rows(text), _contiguous_rows(image)
    vectors = [_contiguous_rows(vector) for vector in (*scale, *shift, *gate)]
    if batch > 1 and len({vector.stride(0) for vector in vectors}) > 1:
        vectors = [vector.contiguous() for vector in vectors]
    sums = [text.new_empty(batch, texts + images, width)] if out else []
    rows = empty_rows(text, batch, texts + images, width, quantized)
    launch(
        "modulate",
        (batch * (texts + images),),
        text,
        *(rows if quantized else (rows[0], None)),
        sums[0] if sums else None,
        text,
        image,
        *vectors[:4],
        *((x.contiguous() for x in out) if out else (None, None)),
        *(vectors[4:] if out else (None, None)),
        texts,
        images,
        *text.stride()[:2],
        *image.stride()[:2],
        vectors[0].stride(0),
        eps,
        WIDTH=width,
        PART=part(width),
        ADDED=bool(out),
        QUANTIZED=quantized,
    )
    return sums + rows


def modulate_reference(
    tokens: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    out: Sequence[Tensor],
    gate: Sequence[Tensor],
    eps: float,
    quantized: bool,
) -> list[Tensor]:
    """`modulate` in plain PyTorch."""
    dtype, sums, rows = tokens[0].dtype, [], []
    for index, x in enumerate(tokens):
        if out:
            x = (x.float() + gate[index][:, None].float() * out[index].float()).to(dtype)
            sums.append(x)
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
        rows.append(normed * (1 + scale[index][:, None].float()) + shift[index][:, None].float())
    return [torch.cat(part, dim=1) for part in (sums,) if part] + _rounded(torch.cat(rows, dim=1), dtype, quantized)


def _rotate_shapes(
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    image_norms: Sequence[Tensor],  # noqa: ARG001 - the operator's
    text_norms: Sequence[Tensor],  # noqa: ARG001
    cosine: Tensor,  # noqa: ARG001
    sine: Tensor,  # noqa: ARG001
    eps: float,  # noqa: ARG001
) -> Tensor:
    batch, images, heads, width = image[0].shape
    texts = text[0].shape[1] if text else 0
    return image[0].new_empty(batch, texts + images, len(image), heads, width)


@_operator(_rotate_shapes)
def rotate(
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    image_norms: Sequence[Tensor],
    text_norms: Sequence[Tensor],
    cosine: Tensor,
    sine: Tensor,
    eps: float,
) -> Tensor:
    """Query and key of text and image, joined, after RMSNorm over each head and rotary embedding; and value, joined.

    Args:
        image: query, key and, if it is to be joined, value of the image's tokens, (batch, images, heads, width) each.
        text: the same of the text's, (batch, texts, heads, width); or empty where all tokens are in ``image``.
        image_norms: the norms' weights (width,) for query and key.
        text_norms: likewise; or empty.
        cosine: (texts + images, width), each for the pair of dimensions that it turns.
        sine: likewise.
        eps: of the norms.

    Returns:
        (batch, tokens, query, key and perhaps value, heads, width).
    """
    query = image[0]
    if not launches(query) or query.shape[3] & (query.shape[3] - 1):
        return rotate_reference(image, text, image_norms, text_norms, cosine, sine, eps)
    batch, images, heads, width = query.shape
    image = _alike(image)
    text = _alike(text) if text else image
    texts = text[0].shape[1] if text is not image else 0
    joint = query.new_empty(batch, texts + images, len(image), heads, width)
    of_program = min(heads & -heads, 8)
    value = len(image) == 3
    launch(
        "rotate",
        (batch * (texts + images), heads // of_program),
        query,
        joint,
        *text[:2],
        text[2] if value else None,
        *image[:2],
        image[2] if value else None,
        *(text_norms if texts else image_norms),
        *image_norms,
        cosine.contiguous(),
        sine.contiguous(),
        texts,
        images,
        *text[0].stride()[:2],
        *image[0].stride()[:2],
        *joint.stride()[1:3],
        eps,
        HEADS=of_program,
        HEAD=width,
        VALUE=value,
    )
    return joint


def rotate_reference(
    image: Sequence[Tensor],
    text: Sequence[Tensor],
    image_norms: Sequence[Tensor],
    text_norms: Sequence[Tensor],
    cosine: Tensor,
    sine: Tensor,
    eps: float,
) -> Tensor:
    """`rotate` in plain PyTorch."""
    streams = [(text, text_norms), (image, image_norms)] if text else [(image, image_norms)]
    joined = []
    for kind in range(len(image)):
        parts = [stream[kind] for stream, _ in streams]
        if kind < 2:
            normed = [
                F.rms_norm(x.float(), x.shape[-1:], norms[kind].float(), eps)
                for x, (_, norms) in zip(parts, streams, strict=True)
            ]
            x = torch.cat(normed, dim=1)
            even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
            turned = torch.stack([-odd, even], dim=-1).flatten(-2)
            joined.append((x * cosine[:, None] + turned * sine[:, None]).to(image[0].dtype))
        else:
            joined.append(torch.cat(parts, dim=1))
    return torch.stack(joined, dim=2)


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh (https://arxiv.org/abs/1606.08415) as x / (1 + e^(−2u)), which loses nothing where tanh(u) → −1."""
    factor = -2 * sqrt(2 / pi) * log2(torch.e)
    return x / (1 + torch.exp2(x * (factor + factor * 0.044715 * x * x)))


def launches(x: Tensor) -> bool:
    """Whether kernels run as Triton programs on a tensor: on CUDA, and everywhere by Triton's interpreter."""
    return has_triton() and (x.is_cuda or _interpreted())


def runs_on(device: torch.device) -> bool:
    """Whether they are compiled programs on a device, and so faster than what PyTorch's compiler makes."""
    if device.type != "cuda" or not has_triton() or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def part(width: int, most: int = 4096) -> int:
    """Elements of a row that a program computes at once: a power of two that divides it, or one that covers it."""
    divisor = min(width & -width, most)
    if width <= MOST_PARTS * divisor:
        return max(divisor, 1)
    return 1 << (width - 1).bit_length()


@cache
def has_triton() -> bool:
    """Whether Triton is installed, as it is for Linux only."""
    return find_spec("triton") is not None


@cache
def _programs() -> Any:
    return importlib.import_module("flux_lora.speed.programs")


def _interpreted() -> bool:
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def launch(name: str, grid: tuple[int, ...], example: Tensor, *arguments: object, **constants: object) -> None:
    """Run a program by its name, a row of ``example``'s device each; an empty grid runs nothing."""
    if 0 in grid:
        return
    program = getattr(_programs(), name)[grid]
    if example.is_cuda and example.device.index != torch.cuda.current_device():
        with torch.cuda.device(example.device):
            program(*arguments, **constants, num_warps=WARPS[name])
    else:
        program(*arguments, **constants, num_warps=WARPS[name])


def _one_of(first: Tensor | None, second: Tensor | None) -> Tensor:
    found = second if first is None else first
    if found is None:
        raise ValueError("nothing to join")
    return found


def empty_rows(example: Tensor, batch: int, tokens: int, width: int, quantized: bool) -> list[Tensor]:
    """Make room for rows (batch, tokens, width): in the type of ``example``, or in eight bits, with a scale each."""
    if not quantized:
        return [example.new_empty(batch, tokens, width)]
    return [
        example.new_empty(batch, tokens, width, dtype=FP8),
        example.new_empty(batch, tokens, 1, dtype=torch.float32),
    ]


def _rounded(rows: Tensor, dtype: torch.dtype, quantized: bool) -> list[Tensor]:
    return list(quantize_tokens(rows)) if quantized else [rows.to(dtype)]


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _alike(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Tensors (batch, tokens, heads, width) of the same strides, whose heads lie behind one another."""
    strides, width = parts[0].stride(), parts[0].shape[3]
    if strides[2:] == (width, 1) and all(part.stride() == strides for part in parts):
        return parts
    return [part.contiguous() for part in parts]
