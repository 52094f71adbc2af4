"""Updates against their definitions, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flux_lora.lora.deltas import Direction, Full, Hadamard, Kronecker, LowRank, Magnitude, Rows, Update

CPU = torch.device("cpu")
TARGET = (Rows("q.weight", 0, 8), Rows("k.weight", 0, 4))
ROWS, COLUMNS = 12, 6


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


WEIGHT = numbers(ROWS, COLUMNS)
UP, DOWN, UP2, DOWN2 = numbers(ROWS, 2), numbers(2, COLUMNS), numbers(ROWS, 3), numbers(3, COLUMNS)
ROW_MAGNITUDE, COLUMN_MAGNITUDE = numbers(ROWS, 1).abs(), numbers(1, COLUMNS).abs()
W1, W2_A, W2_B = numbers(3, 2), numbers(4, 1), numbers(1, 3)


def normed(moved: Tensor, magnitude: Tensor, dim: int) -> Tensor:
    change: Tensor = magnitude * moved / moved.norm(dim=dim, keepdim=True) - WEIGHT
    return change


def low_rank(kind: torch.dtype) -> Direction:
    return LowRank(TARGET, UP.to(kind), DOWN.to(kind), 0.75)


UPDATES: dict[str, tuple[Callable[[torch.dtype], Update], Callable[[], Tensor]]] = {
    "low rank": (low_rank, lambda: 0.75 * UP @ DOWN),
    "full": (lambda kind: Full(TARGET, WEIGHT.to(kind), 2.0), lambda: 2 * WEIGHT),
    "Hadamard": (
        lambda kind: Hadamard(TARGET, (UP.to(kind), DOWN.to(kind)), (UP2.to(kind), DOWN2.to(kind)), 0.5),
        lambda: 0.5 * (UP @ DOWN) * (UP2 @ DOWN2),
    ),
    "Kronecker": (
        lambda kind: Kronecker(TARGET, (W1.to(kind),), (W2_A.to(kind), W2_B.to(kind)), 0.5),
        lambda: 0.5 * torch.kron(W1, W2_A @ W2_B),
    ),
    "magnitude of rows": (
        lambda kind: Magnitude(low_rank(kind), ROW_MAGNITUDE.to(kind), 0.0),
        lambda: normed(WEIGHT + 0.75 * UP @ DOWN, ROW_MAGNITUDE, 1),
    ),
    "magnitude of columns, over all target rows": (
        lambda kind: Magnitude(low_rank(kind), COLUMN_MAGNITUDE.to(kind), 0.0),
        lambda: normed(WEIGHT + 0.75 * UP @ DOWN, COLUMN_MAGNITUDE, 0),
    ),
}


def change(update: Update, scale: float, block: int) -> Tensor:
    """Compute scale · ΔW by adding it to zeros, a block of rows at a time."""
    delta = update.delta(CPU, lambda: WEIGHT.float())
    out = torch.zeros(ROWS, COLUMNS)
    for start in range(0, ROWS, block):
        delta.add_rows(out[start : start + block], start, min(start + block, ROWS), scale)
    return out.double()


@pytest.mark.parametrize("block", [1, 5, 12])
@pytest.mark.parametrize("scale", [-1.0, 0.3, 2.0])
@pytest.mark.parametrize("name", UPDATES)
def test_definition(name: str, scale: float, block: int) -> None:
    make, expected = UPDATES[name]
    torch.testing.assert_close(change(make(torch.float32), scale, block), scale * expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_faster_products_that_others_allow_are_not_used(precision: str) -> None:
    """TF32 on GPUs, bfloat16 on CPUs that have instructions for it."""
    target, square = (Rows("q.weight", 0, 512),), torch.randn(512, 512)

    def change() -> Tensor:
        out = torch.zeros(512, 512)
        for update in (LowRank(target, square, square, 1.0), Hadamard(target, (square, square), (square, square), 1.0)):
            update.delta(CPU, Tensor).add_rows(out, 0, 512, 1.0)
        return out

    expected = change()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(change(), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["low rank", "full", "Hadamard", "Kronecker"])
def test_the_base_is_read_only_where_it_matters(name: str) -> None:
    def never() -> Tensor:
        raise AssertionError

    UPDATES[name][0](torch.float32).delta(CPU, never)


def test_adding_does_not_touch_the_base() -> None:
    weight = WEIGHT.float()
    UPDATES["magnitude of rows"][0](torch.float32).delta(CPU, lambda: weight).add_rows(torch.zeros(12, 6), 0, 12, 1.0)
    assert torch.equal(weight, WEIGHT.float())
