"""Merging as Triton programs, for `kernels.py` to time: W + scale · up @ down in float32, rounded or quantized once."""

import triton
import triton.language as tl


@triton.jit
def _sum(
    base, up, down, scale, row, column, WIDTH,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """``PRODUCT``: one multiplication after the other, or Triton's own product in that precision."""
    if PRODUCT == "loop":
        delta = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in tl.static_range(RANK):
            delta += tl.load(up + row * RANK + k)[:, None] * tl.load(down + k * WIDTH + column)[None, :]
    else:
        rank = tl.arange(0, RANK)
        left = tl.load(up + row[:, None] * RANK + rank[None, :])
        right = tl.load(down + rank[:, None] * WIDTH + column[None, :])
        delta = tl.dot(left, right, input_precision=PRODUCT)
    return tl.load(base + row[:, None] * WIDTH + column[None, :]).to(tl.float32) + scale * delta


@triton.jit
def tile(
    out, base, up, down, scale, WIDTH,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """A tile of the weight in bfloat16."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = _sum(base, up, down, scale, row, column, WIDTH, RANK, ROWS, COLUMNS, PRODUCT)
    tl.store(out + row[:, None] * WIDTH + column[None, :], total.to(out.dtype.element_ty))


@triton.jit
def lines(
    values, scales, base, up, down, scale, WIDTH,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Some rows of the weight in E4M3: computed once for their largest, and again to be quantized."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    peak = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        peak = tl.maximum(peak, tl.abs(_sum(base, up, down, scale, row, column, WIDTH, RANK, ROWS, COLUMNS, PRODUCT)))
    largest = tl.max(peak, 1)
    tl.store(scales + row, tl.where(largest > 0, tl.math.div_rn(largest, tl.full((ROWS,), 448.0, tl.float32)), 1.0))
    factor = tl.where(largest > 0, tl.math.div_rn(tl.full((ROWS,), 448.0, tl.float32), largest), 1.0)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        total = _sum(base, up, down, scale, row, column, WIDTH, RANK, ROWS, COLUMNS, PRODUCT) * factor[:, None]
        tl.store(values + row[:, None] * WIDTH + column[None, :], total.to(tl.float8e4nv))
