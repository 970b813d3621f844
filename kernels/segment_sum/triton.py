"""Triton `sum_rows`.

Bound by memory: every row is read once and every sum written once, (E + n) · D numbers and one index a row,
for E · D additions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launch

BLOCK_ROWS = 16  # about half an atom's edges: few masked rows, and enough loads in flight
MAX_COLUMNS = 128


@triton.jit
def _sum_rows_kernel(
    y, stride, order, ptr, out, columns, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr
):
    """One segment and COLUMNS columns a program."""
    segment = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    first, last = tl.load(ptr + segment), tl.load(ptr + segment + 1)
    total = tl.zeros((BLOCK, COLUMNS), SUM)
    for start in range(first, last, BLOCK):
        place = start + tl.arange(0, BLOCK)
        row = tl.load(order + place, mask=place < last, other=0)
        mask = (place < last)[:, None] & inside[None, :]
        total += tl.load(y + row[:, None] * stride + column[None, :], mask=mask, other=0).to(SUM)
    tl.store(out + segment * columns + column, tl.sum(total, 0), mask=inside)


def sum_rows(y: torch.Tensor, order: torch.Tensor, ptr: torch.Tensor) -> torch.Tensor:
    """Launch `sum_rows`; see reference.py. The rows of y may be columns of wider ones."""
    if y.stride(1) != 1:
        y = y.contiguous()
    num_segments, columns = ptr.shape[0] - 1, y.shape[1]
    out = y.new_empty(num_segments, columns)
    block = min(triton.next_power_of_2(max(columns, 1)), MAX_COLUMNS)
    launch(
        _sum_rows_kernel,
        (num_segments, triton.cdiv(columns, block)),
        y,
        y.stride(0),
        order,
        ptr,
        out,
        columns,
        BLOCK=BLOCK_ROWS,
        COLUMNS=block,
        SUM=tl.float64 if y.dtype == torch.float64 else tl.float32,
    )
    return out
