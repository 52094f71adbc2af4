"""Low-rank updates merged by one program for a weight: it is read once, W + Σ s·B·A stays on the chip, and is rounded.

Its float32 sums are within half a step of the formula's value in float64, but for ties, as PyTorch's products are; the
last bits may be others. What is summed in which order depends on the adapters and scales alone.
"""

import importlib
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from flux_lora.lora.deltas import LowRank, float32, strength
from flux_lora.speed import kernels
from flux_lora.speed.quantization import QuantizedLinear, Scheme

if TYPE_CHECKING:
    from flux_lora.lora.merge import Contribution, Weight

RANK = 16
"""What ranks are filled up to a multiple of: a program is compiled once, whatever rank an adapter has."""


class Tile(NamedTuple):
    """What a program computes at a time, by warps of 32 threads, and stages in which it loads ahead."""

    rows: int
    columns: int
    warps: int
    stages: int


TILES = {"merge": Tile(64, 128, 4, 3), "merge_eight_bits": Tile(16, 256, 4, 3)}
"""By program, the fastest on an H100 (`benchmarks/kernels.py`)."""


def runs_on(device: torch.device) -> bool:
    """Whether the programs are there for a device."""
    return kernels.runs_on(device)


def merge(weight: "Weight", pristine: Tensor, contributions: "Sequence[Contribution]", device: torch.device) -> bool:
    """Write pristine + contributions into a weight; False, and nothing is written, unless all of them are low-rank.

    Args:
        weight: a matrix, or a quantized layer's; anywhere.
        pristine: its base weights, anywhere.
        contributions: in the order in which they are summed.
        device: computes.
    """
    if len(weight.shape) != 2 or not all(isinstance(item.update, LowRank) for item in contributions):
        return False
    up, down, scale = _factors(contributions, weight.shape, device)
    targets = [weight.values, weight.scales] if isinstance(weight, QuantizedLinear) else [weight]
    there = [
        target
        if target.device == device and target.is_contiguous()
        else torch.empty(target.shape, dtype=target.dtype, device=device)
        for target in targets
    ]
    base = pristine.to(device).contiguous()
    launch("merge_eight_bits" if len(targets) == 2 else "merge", there, base, up, down, scale)
    for target, written in zip(targets, there, strict=True):
        if target is not written:
            target.copy_(written)
    return True


def launch(name: str, out: Sequence[Tensor], base: Tensor, up: Tensor, down: Tensor, scale: float) -> None:
    """Launch a program: out = base + scale · up @ down, where up and down are float32 and contiguous."""
    tile, (height, width) = TILES[name], base.shape
    grid = [-(-height // tile.rows)] + ([-(-width // tile.columns)] if name == "merge" else [])
    program = getattr(_programs(), name)[tuple(grid)]
    with torch.cuda.device(base.device) if base.is_cuda else nullcontext():
        program(
            *out, base, up, down, scale, height, width, up.shape[1],
            ROWS=tile.rows, COLUMNS=tile.columns, RANK=RANK, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def warm_up(device: torch.device, dtype: torch.dtype, scheme: Scheme | None) -> None:
    """Compile the programs for weights of a type, and for those that are quantized from it: it takes seconds."""
    up, down = torch.zeros(128, RANK, device=device), torch.zeros(RANK, 128, device=device)
    base = torch.zeros(128, 128, dtype=dtype, device=device)
    launch("merge", [torch.empty_like(base)], base, up, down, 1.0)
    if scheme:
        layer = QuantizedLinear(nn.Linear(128, 128, dtype=dtype, device="meta"), scheme, device)
        launch("merge_eight_bits", [layer.values, layer.scales], base, up, down, 1.0)


def _factors(
    contributions: "Sequence[Contribution]", shape: torch.Size, device: torch.device
) -> tuple[Tensor, Tensor, float]:
    """Up (rows, r), down (r, columns) and s, such that s · up @ down is the sum of all contributions."""
    updates: list[Any] = [item.update for item in contributions]
    ranks = [len(update.down) for update in updates]
    if len(updates) == 1 and contributions[0].stop - contributions[0].start == shape[0] and not ranks[0] % RANK:
        item, update = contributions[0], updates[0]
        rows = update.up[item.offset : item.offset + shape[0]]
        return (
            float32(rows, device).contiguous(),
            float32(update.down, device).contiguous(),
            strength(item.scale, update.factor),
        )
    rank = max(1, -(-sum(ranks) // RANK)) * RANK
    up, down = torch.zeros(shape[0], rank, device=device), torch.zeros(rank, shape[1], device=device)
    start = 0
    for item, update in zip(contributions, updates, strict=True):
        stop = start + len(update.down)
        rows = update.up[item.offset : item.offset + item.stop - item.start]
        up[item.start : item.stop, start:stop] = float32(rows, device) * strength(item.scale, update.factor)
        down[start:stop] = update.down.to(device)
        start = stop
    return up, down, 1.0


def _programs() -> Any:
    return importlib.import_module("flux_lora.lora.programs")
