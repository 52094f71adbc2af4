"""OFT and BOFT: orthogonal matrices that turn the rows or the columns of a weight.

OFT (https://arxiv.org/abs/2306.07280) turns each block of an axis by itself; BOFT (https://arxiv.org/abs/2311.06243)
does so several times, with the axis in another order each time. A rotation is made from a skew-symmetric matrix by
Cayley's formula. The trainers differ in all of it: the axis, the formula and its sign, what bounds the rotation.

What is served is linear in the scale, as for every other update: W + s·(R(W) − W). The trainers, which have scales of
their own for this, agree with it at scale 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flux_lora.lora.deltas import Delta, Dense, Rows, float32, full_float32

Axis = Literal["rows", "columns"]
Make = Callable[[Tensor], Tensor]
"""From what a file holds, in float32, to R − I (stages, blocks, b, b), whose digits the identity does not take."""


@dataclass(frozen=True)
class Rotation:
    """ΔW = m ∘ R(W) − W, where R multiplies W's axis, stage by stage, with a block-diagonal orthogonal matrix.

    Args:
        target: where the rows of ΔW lie.
        axis: which axis of W (out, in) is turned.
        skew: what the rotations are made from.
        make: makes them; a single block serves all of the axis.
        orders: of each stage, the indices of the axis as its blocks take them; None: as it is.
        magnitude: m, (out, 1); None: 1.
    """

    target: tuple[Rows, ...]
    axis: Axis
    skew: Tensor
    make: Make
    orders: tuple[Tensor | None, ...] = (None,)
    magnitude: Tensor | None = None

    def delta(self, device: torch.device, pristine: Callable[[], Tensor]) -> Delta:
        """Compute what the rotation adds to the base weights, on a device."""
        weight = float32(pristine(), device)
        turned = weight if self.axis == "rows" else weight.T
        change = torch.zeros_like(turned)
        with full_float32():
            for blocks, order in zip(self.make(float32(self.skew, device)), self.orders, strict=True):
                step = _stage(turned, blocks, None if order is None else order.to(device))
                change += step
                turned = turned + step
        change = change if self.axis == "rows" else change.T
        if self.magnitude is not None:
            magnitude = float32(self.magnitude, device)
            change = magnitude * change + (magnitude - 1) * weight
        return Dense(change, 1.0)


def _stage(turned: Tensor, blocks: Tensor, order: Tensor | None) -> Tensor:
    size = len(turned)
    ordered = turned if order is None else turned[order]
    parts = ordered.reshape(size // blocks.shape[-1], blocks.shape[-1], -1)
    del ordered
    multiplied = torch.matmul(blocks, parts).reshape(size, -1)
    del parts
    return multiplied if order is None else torch.empty_like(multiplied).index_copy_(0, order, multiplied)


def kohya(constraint: float) -> Make:
    """``networks/oft_flux.py`` of kohya-ss/sd-scripts, from blocks (n, b, b); it multiplies with what is transposed."""

    def make(blocks: Tensor) -> Tensor:
        skew = blocks - blocks.mT
        norm = torch.linalg.vector_norm(skew)
        skew = skew * ((norm.clamp(max=constraint) + 1e-8) / (norm + 1e-8))
        return _cayley(-skew).mT[None]

    return make


def lycoris(constraint: float) -> Make:
    """``lycoris/functional/diag_oft.py`` and ``boft.py`` of KohakuBlueleaf/LyCORIS, from ([m,] n, b, b); 0: no bound.

    The former multiplies with what is transposed, the latter does not.
    """

    def make(blocks: Tensor) -> Tensor:
        skew = blocks - blocks.mT
        norm = torch.linalg.vector_norm(skew) + 1e-8
        if constraint > 0 and norm > constraint:
            skew = skew * constraint / norm
        rotations = _cayley(-skew)
        return rotations.mT[None] if blocks.ndim == 3 else rotations

    return make


@dataclass(frozen=True)
class PeftOft:
    """``tuners/oft/layer.py`` of huggingface/peft, and OneTrainer's ``oft_utils.py``, from vectors (n, b·(b − 1)/2).

    Args:
        terms: of the Neumann series that stands for Cayley's formula; None: the formula itself, whose sign is another.
        last_twice: whether the last of the terms counts twice, as it did before PEFT 0.18.
        bound: of all blocks' Frobenius norm (COFT), if there is one.
        scaled: whether the vectors are stored times 2·√(b − 1), as OneTrainer can do.
    """

    terms: int | None = 5
    last_twice: bool = False
    bound: float | None = None
    scaled: bool = False

    def __call__(self, vectors: Tensor) -> Tensor:
        """Rotate vectors."""
        size = block_size(vectors.shape[1])
        skew = vectors.new_zeros(len(vectors), size, size)
        rows, columns = torch.triu_indices(size, size, 1, device=vectors.device)
        skew[:, rows, columns] = vectors / (2 * math.sqrt(size - 1)) if self.scaled else vectors
        skew = skew - skew.mT
        if self.bound is not None:
            limit = self.bound / math.sqrt(len(skew))
            norms = torch.linalg.vector_norm(skew, dim=(1, 2), keepdim=True)
            skew = torch.where(norms <= limit, skew, skew * (limit / norms))
        if self.terms is None:
            return _cayley(skew)[None]
        last = self.terms - 1 if self.last_twice or self.terms < 3 else max(self.terms - 1, 3)
        rotations, power = torch.zeros_like(skew), torch.eye(size, device=skew.device).expand_as(skew)
        for exponent in range(1, last + 1):
            power = power @ skew
            rotations.add_(power, alpha=2.0 if self.last_twice or exponent < max(last, 3) else 1.0)
        return rotations[None]


BY_DEFAULT = PeftOft()
"""As PEFT does it where nothing else is asked for, and OneTrainer always."""


def peft_boft(blocks: Tensor) -> Tensor:
    """``tuners/boft/layer.py`` of huggingface/peft, from (m, n, b, b)."""
    return _cayley((blocks - blocks.mT) / 2)


def block_size(elements: int) -> int:
    """The b whose skew-symmetric matrices have so many free elements, or 0."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if elements and size * (size - 1) // 2 == elements else 0


def lycoris_order(size: int, block: int, stage: int) -> Tensor:
    """How stage i of LyCORIS's BOFT orders an axis: rows 2^i·b/2 apart come together."""
    return torch.arange(size).view(-1, 2, 2**stage * block // 2).mT.reshape(-1)


def peft_order(size: int, block: int, stage: int) -> Tensor:
    """The same of PEFT's: of 2^i blocks, the first halves of the result are those that belong to its even places."""
    return torch.arange(size).view(-1, 2**stage, 2, block // 2).transpose(1, 2).reshape(-1).argsort()


def _cayley(skew: Tensor) -> Tensor:
    """(I − Q)(I + Q)⁻¹ − I, which is −2·Q·(I + Q)⁻¹."""
    rotations: Tensor = torch.linalg.solve(torch.eye(skew.shape[-1], device=skew.device) + skew, -2 * skew, left=False)
    return rotations
