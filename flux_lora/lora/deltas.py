"""The mathematics of adapters: what each algorithm adds to a weight.

Every update is a lazily computed ΔW with W' = W + s·ΔW for any scale s, computed in float32 whatever type the file has.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from flux_lora.errors import FormatError


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of dimension 0 of one parameter of a served module."""

    parameter: str
    start: int
    stop: int


class Delta(Protocol):
    """ΔW on one device."""

    def add_rows(self, out: Tensor, start: int, stop: int, scale: float) -> None:
        """Add scale · ΔW[start:stop] to ``out``: float32, on the delta's device, with stop − start rows."""


class Update(Protocol):
    """ΔW of one weight as its trainer lays it out."""

    @property
    def target(self) -> tuple[Rows, ...]:
        """Where the rows of ΔW lie, in the trainer's order: a fused qkv covers three parameters."""

    def delta(self, device: torch.device, pristine: Callable[[], Tensor]) -> Delta:
        """Bind ΔW to a device.

        Args:
            device: where ``add_rows`` will compute.
            pristine: gives the target rows of the base weights, concatenated, in their own type, on that device; called
                only when ΔW depends on them. They are not to be changed.
        """


@dataclass(frozen=True)
class LowRank:
    """LoRA (https://arxiv.org/abs/2106.09685): ΔW = factor · up @ down, with up (out, r) and down (r, in)."""

    target: tuple[Rows, ...]
    up: Tensor
    down: Tensor
    factor: float

    def delta(self, device: torch.device, pristine: Callable[[], Tensor]) -> Delta:  # noqa: ARG002 - independent of W
        """Bind up @ down to a device."""
        return _LowRankDelta(float32(self.up, device), float32(self.down, device), self.factor)


@dataclass(frozen=True)
class Full:
    """A difference stored whole: ΔW = value, a matrix (out, in), or a vector for a bias or a norm."""

    target: tuple[Rows, ...]
    value: Tensor
    factor: float = 1.0

    def delta(self, device: torch.device, pristine: Callable[[], Tensor]) -> Delta:  # noqa: ARG002 - independent of W
        """Bind the value to a device."""
        return Dense(float32(self.value, device), self.factor)


@dataclass(frozen=True)
class Hadamard:
    """LoHa (https://arxiv.org/abs/2108.06098): ΔW = factor · w1 ∘ w2.

    w1 and w2 are (out, in), each given by the low-rank matrices whose product it is.
    """

    target: tuple[Rows, ...]
    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    factor: float

    def delta(self, device: torch.device, pristine: Callable[[], Tensor]) -> Delta:  # noqa: ARG002 - independent of W
        """Compute the product of the two on a device."""
        return Dense(_product(self.w1, device) * _product(self.w2, device), self.factor)


@dataclass(frozen=True)
class Kronecker:
    """LoKr (https://arxiv.org/abs/2309.14859): ΔW = factor · w1 ⊗ w2.

    w1 (a, c) and w2 (b, d), each a matrix or low-rank matrices whose product it is, give ΔW (a·b, c·d).
    """

    target: tuple[Rows, ...]
    w1: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    factor: float

    def delta(self, device: torch.device, pristine: Callable[[], Tensor]) -> Delta:  # noqa: ARG002 - independent of W
        """Compute the Kronecker product on a device."""
        return Dense(torch.kron(_product(self.w1, device), _product(self.w2, device)), self.factor)


@dataclass(frozen=True)
class Whole:
    """A layer stored whole: ΔW = value − W, a matrix (out, in), or a vector for a bias or a norm."""

    target: tuple[Rows, ...]
    value: Tensor

    def delta(self, device: torch.device, pristine: Callable[[], Tensor]) -> Delta:
        """Take the difference to the base weights on a device."""
        return Dense(float32(self.value, device) - float32(pristine(), device), 1.0)


Direction = LowRank | Full | Hadamard | Kronecker


@dataclass(frozen=True)
class Magnitude:
    """DoRA (https://arxiv.org/abs/2402.09353): ΔW = m · (W + V) / ‖W + V‖ − W, where V is the ``direction``'s ΔW.

    m is (out, 1) and the norm that of each row, or m is (1, in) and the norm that of each column, over all target rows
    together. This is what trainers compute at strength 1. At other scales s we serve W + s·ΔW, as for every other
    algorithm, where PEFT and LyCORIS scale V or (m / ‖…‖ − 1) inside the formula.
    """

    direction: Direction
    magnitude: Tensor
    epsilon: float

    @property
    def target(self) -> tuple[Rows, ...]:
        """Where the rows of ΔW lie."""
        return self.direction.target

    def delta(self, device: torch.device, pristine: Callable[[], Tensor]) -> Delta:
        """Compute what magnitude and direction add to the base weights, on a device."""
        weight, magnitude = pristine(), float32(self.magnitude, device)
        direction = self.direction.delta(device, pristine)
        if magnitude.shape[1] == 1:
            return _RowsMagnitude(weight, direction, magnitude, self.epsilon)
        weight = float32(weight, device)
        moved = weight.clone()
        direction.add_rows(moved, 0, len(moved), 1.0)
        norm = torch.linalg.vector_norm(moved, dim=0, keepdim=True)
        return Dense(moved.mul_(magnitude / (norm + self.epsilon)).sub_(weight), 1.0)


@dataclass(frozen=True)
class _RowsMagnitude:
    """Of a magnitude for each row: no row depends on another one, so none is computed before it is asked for."""

    weight: Tensor
    direction: Delta
    magnitude: Tensor
    epsilon: float

    def add_rows(self, out: Tensor, start: int, stop: int, scale: float) -> None:
        weight = float32(self.weight[start:stop], out.device)
        moved = weight.clone()
        self.direction.add_rows(moved, start, stop, 1.0)
        norm = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
        moved.mul_(self.magnitude[start:stop] / (norm + self.epsilon)).sub_(weight)
        out.add_(moved, alpha=scale)


@dataclass(frozen=True)
class _LowRankDelta:
    up: Tensor
    down: Tensor
    factor: float

    def add_rows(self, out: Tensor, start: int, stop: int, scale: float) -> None:
        with full_float32():
            out.addmm_(self.up[start:stop], self.down, alpha=strength(scale, self.factor))


@dataclass(frozen=True)
class Dense:
    """ΔW = factor · value."""

    value: Tensor
    factor: float

    def add_rows(self, out: Tensor, start: int, stop: int, scale: float) -> None:
        """Add scale · ΔW[start:stop] to ``out``."""
        out.add_(self.value[start:stop], alpha=strength(scale, self.factor))


def strength(scale: float, factor: float) -> float:
    """What scales an update, all in all.

    Raises:
        FormatError: float32 has no such number; each of the two may be fine by itself.
    """
    if abs(scale * factor) > torch.finfo(torch.float32).max:
        raise FormatError(
            f"The LoRA cannot be applied at scale {scale:g}: its alpha makes that {factor:g} times its numbers, which "
            "is beyond float32."
        )
    return scale * factor


def float32(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, converted there."""
    return tensor.to(device).to(torch.float32)


def _product(factors: tuple[Tensor, ...], device: torch.device) -> Tensor:
    with full_float32():
        return reduce(torch.matmul, (float32(factor, device) for factor in factors))


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep TF32 and bfloat16 out of float32 products, whatever another library has allowed; nested, it costs little."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]  # made late
    allowed = [backend.fp32_precision for backend in backends]
    if allowed == ["ieee", "ieee"]:
        yield
        return
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision
