"""What `fused` launches: Triton programs that merge low-rank updates, W + scale · up @ down, and round once.

Sums are float32 by multiplications and additions of float32, in one order. W is read and written once where it is
rounded to its own type; where it is quantized its rows are computed twice, for their largest number and to be written.
"""

import triton
import triton.language as tl

from flux_lora.speed.programs import LARGEST, eight_bits, rounded


@triton.jit
def _sum(
    base,
    up,
    down,
    scale,
    row,
    column,
    height,
    width,
    rank,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """A tile of the merged weight in float32; zeros beyond its edges. ``rank`` is a multiple of RANK."""
    in_rows, in_columns = row[:, None] < height, column[None, :] < width
    delta = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rank, RANK):
        k = start + tl.arange(0, RANK)
        left = tl.load(up + row[:, None] * rank + k[None, :], mask=in_rows, other=0.0)
        right = tl.load(down + k[:, None] * width + column[None, :], mask=in_columns, other=0.0)
        delta = tl.dot(left, right, delta, input_precision="ieee")
    place = row[:, None].to(tl.int64) * width + column[None, :]
    return tl.load(base + place, mask=in_rows & in_columns, other=0.0).to(tl.float32) + scale * delta


@triton.jit
def merge(
    out,
    base,
    up,
    down,
    scale,
    height,
    width,
    rank,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """A tile of the weight (height, width), rounded to the type of ``out``."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = _sum(base, up, down, scale, row, column, height, width, rank, ROWS, COLUMNS, RANK)
    place = row[:, None].to(tl.int64) * width + column[None, :]
    inside = (row[:, None] < height) & (column[None, :] < width)
    tl.store(out + place, rounded(total, out.dtype.element_ty), mask=inside)


@triton.jit
def merge_eight_bits(
    values,
    scales,
    base,
    up,
    down,
    scale,
    height,
    width,
    rank,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    """Whole rows of the weight (height, width) in E4M3, each with a scale, as `QuantizedLinear.write_rows` has them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    peak = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        total = _sum(base, up, down, scale, row, column, height, width, rank, ROWS, COLUMNS, RANK)
        peak = tl.maximum(peak, tl.abs(total))
    largest = tl.max(peak, 1)
    step = tl.where(largest > 0, tl.math.div_rn(largest, tl.full((ROWS,), LARGEST, tl.float32)), 1.0)
    tl.store(scales + row, step, mask=row < height)
    steps = tl.broadcast_to(step[:, None], (ROWS, COLUMNS))
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        total = _sum(base, up, down, scale, row, column, height, width, rank, ROWS, COLUMNS, RANK)
        total = tl.minimum(tl.maximum(tl.math.div_rn(total, steps), -LARGEST), LARGEST)
        place = row[:, None].to(tl.int64) * width + column[None, :]
        inside = (row[:, None] < height) & (column[None, :] < width)
        tl.store(values + place, eight_bits(total), mask=inside)
