"""Triton kernels of `residual_norm`, all bound by memory.

kernel                traffic per row (numbers)          what it does
partial statistics    C      y                           Welford's running mean and squares, a part a program
merge statistics      -                                  Chan's merge of the parts
forward               3 C    x, y → out
backward sums         4 C    ∂out, out, y → ∂x           sums of ∂x and ∂x · ŷ, a part a program
backward y            3 C    ∂x, y → ∂y
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..activations_triton import softplus, softplus_slope
from ..launch import launch
from ..precision import accumulator_dtype

BLOCK_ROWS = 16
MAX_COLUMNS = 128
MERGED_COLUMNS = 8  # at once in the merge: a sector of float32


@triton.jit
def _merged(count, mean, square):
    """Merge along axis 0; `square` is the sum of squared distances from the mean."""
    total = tl.sum(count, 0)
    center = tl.sum(count * mean, 0) / tl.maximum(total, 1)
    away = mean - center[None, :]
    return total, center, tl.sum(square + count * away * away, 0)


@triton.jit
def _store_statistics(out, column, total, mean, square, C: tl.constexpr):
    tl.store(out + column, total, mask=column < C)
    tl.store(out + C + column, mean, mask=column < C)
    tl.store(out + 2 * C + column, square / tl.maximum(total, 1), mask=column < C)


@triton.jit(do_not_specialize=["num_rows", "rows_each"])
def _partial_statistics_kernel(
    y, parts, num_counted, num_rows, rows_each,
    C: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Every slot of the tile follows its own rows; the slots are merged at the end."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.minimum((part + 1) * rows_each, num_rows)
    if num_counted is not None:
        end = tl.minimum(end, tl.load(num_counted))
    count = tl.zeros((BLOCK, 1), ACC)
    mean = tl.zeros((BLOCK, COLUMNS), ACC)
    square = tl.zeros((BLOCK, COLUMNS), ACC)
    for start in range(part * rows_each, end, BLOCK):
        row = start + tl.arange(0, BLOCK)[:, None]
        mask = (row < end) & (column < C)[None, :]
        value = tl.load(y + row * C + column[None, :], mask=mask, other=0).to(ACC)
        count += (row < end).to(ACC)
        away = tl.where(row < end, value - mean, 0)
        mean += away * (1 / tl.maximum(count, 1))
        square += away * (value - mean)
    total, mean, square = _merged(count + tl.zeros((BLOCK, COLUMNS), ACC), mean, square)
    _store_statistics(parts + part * 3 * C, column, total, mean, square, C)


@triton.jit(do_not_specialize=["num_parts"])
def _merge_statistics_kernel(
    parts, out, num_parts, C: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr
):
    part = tl.arange(0, PARTS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (part < num_parts) & (column < C)[None, :]
    at = parts + part * 3 * C + column[None, :]
    count = tl.load(at, mask=mask, other=0)
    mean = tl.load(at + C, mask=mask, other=0)
    square = tl.load(at + 2 * C, mask=mask, other=0) * count
    total, mean, square = _merged(count, mean, square)
    _store_statistics(out, column, total, mean, square, C)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x, y, mean, var, weight, bias, out, num_rows,
    EPS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < C
    mask = (row < num_rows) & inside[None, :]
    place = row * C + column[None, :]
    scale = tl.load(weight + column, mask=inside, other=0)
    scale = scale / tl.sqrt(tl.load(var + column, mask=inside, other=1) + EPS)
    shift = tl.load(bias + column, mask=inside, other=0)
    away = tl.load(y + place, mask=mask, other=0).to(ACC) - tl.load(mean + column, mask=inside, other=0)
    change = away * scale[None, :] + shift[None, :]
    tl.store(out + place, softplus(tl.load(x + place, mask=mask, other=0).to(ACC) + change), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "rows_each"])
def _backward_sums_kernel(
    grad, out, y, mean, var, grad_x, parts, num_rows, rows_each,
    EPS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < C
    end = tl.minimum((part + 1) * rows_each, num_rows)
    center = tl.load(mean + column, mask=inside, other=0)
    inv_std = 1 / tl.sqrt(tl.load(var + column, mask=inside, other=1) + EPS)
    bias_sum = tl.zeros((BLOCK, COLUMNS), ACC)
    weight_sum = tl.zeros((BLOCK, COLUMNS), ACC)
    for start in range(part * rows_each, end, BLOCK):
        row = start + tl.arange(0, BLOCK)[:, None]
        mask = (row < end) & inside[None, :]
        place = row * C + column[None, :]
        slope = softplus_slope(tl.load(out + place, mask=mask, other=0).to(ACC))
        slope *= tl.load(grad + place, mask=mask, other=0).to(ACC)
        tl.store(grad_x + place, slope, mask=mask)
        bias_sum += slope
        weight_sum += slope * (tl.load(y + place, mask=mask, other=0).to(ACC) - center[None, :])
    at = parts + part * 2 * C + column
    tl.store(at, tl.sum(bias_sum, 0), mask=inside)
    tl.store(at + C, tl.sum(weight_sum, 0) * inv_std, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_y_kernel(
    grad_x, y, mean, var, weight, averages, grad_y, num_counted, num_rows,
    EPS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < C
    mask = (row < num_rows) & inside[None, :]
    place = row * C + column[None, :]
    inv_std = 1 / tl.sqrt(tl.load(var + column, mask=inside, other=1) + EPS)
    slope = tl.load(grad_x + place, mask=mask, other=0).to(ACC)
    if averages is not None:
        center = tl.load(mean + column, mask=inside, other=0)
        standard = (tl.load(y + place, mask=mask, other=0).to(ACC) - center[None, :]) * inv_std[None, :]
        slope -= tl.load(averages + column, mask=inside, other=0)[None, :]
        slope -= standard * tl.load(averages + C + column, mask=inside, other=0)[None, :]
    if num_counted is not None:
        slope = tl.where(row < tl.load(num_counted), slope, 0)
    scale = tl.load(weight + column, mask=inside, other=0) * inv_std
    tl.store(grad_y + place, slope * scale[None, :], mask=mask)


def _tile(y: torch.Tensor) -> tuple[int, dict]:
    """Tiles beside one another, and the constants that describe one."""
    columns = min(triton.next_power_of_2(y.shape[1]), MAX_COLUMNS)
    acc = tl.float64 if y.dtype == torch.float64 else tl.float32
    constants = {"C": y.shape[1], "BLOCK": BLOCK_ROWS, "COLUMNS": columns, "ACC": acc}
    return triton.cdiv(y.shape[1], columns), constants


def _rows_each(num_rows: int, num_parts: int) -> int:
    return triton.cdiv(triton.cdiv(num_rows, max(num_parts, 1)), BLOCK_ROWS) * BLOCK_ROWS


def partial_statistics(y: torch.Tensor, num_parts: int, count: torch.Tensor | None) -> torch.Tensor:
    """Launch the first pass, (R, C) → (P, 3, C)."""
    (num_rows, columns), (tiles, constants) = y.shape, _tile(y)
    parts = y.new_empty(num_parts, 3, columns, dtype=accumulator_dtype(y.dtype))
    launch(
        _partial_statistics_kernel,
        (num_parts, tiles),
        y,
        parts,
        count,
        num_rows,
        _rows_each(num_rows, num_parts),
        **constants,
    )
    return parts


def merge_statistics(parts: torch.Tensor) -> torch.Tensor:
    """Launch the merge, (P, 3, C) → (3, C)."""
    num_parts, _, columns = parts.shape
    out = parts.new_empty(3, columns)
    grid = (triton.cdiv(columns, MERGED_COLUMNS),)
    size = triton.next_power_of_2(num_parts)
    launch(
        _merge_statistics_kernel,
        grid,
        parts,
        out,
        num_parts,
        C=columns,
        PARTS=size,
        COLUMNS=MERGED_COLUMNS,
        num_warps=8,
    )
    return out


def forward(x, y, mean, var, weight, bias, eps: float) -> torch.Tensor:
    """Launch the forward pass, (R, C)."""
    tiles, constants = _tile(y)
    out = torch.empty_like(y)
    grid = (triton.cdiv(y.shape[0], BLOCK_ROWS), tiles)
    launch(_forward_kernel, grid, x, y, mean, var, weight, bias, out, y.shape[0], EPS=eps, **constants)
    return out


def backward_sums(grad, out, y, mean, var, eps: float, num_parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the first backward pass: gradient of x, (R, C), and the parts' sums, (P, 2, C)."""
    (num_rows, columns), (tiles, constants) = y.shape, _tile(y)
    grad_x = torch.empty_like(y)
    parts = mean.new_empty(num_parts, 2, columns)
    launch(
        _backward_sums_kernel,
        (num_parts, tiles),
        grad,
        out,
        y,
        mean,
        var,
        grad_x,
        parts,
        num_rows,
        _rows_each(num_rows, num_parts),
        EPS=eps,
        **constants,
    )
    return grad_x, parts


def backward_y(grad_x, y, mean, var, weight, averages, eps: float, count) -> torch.Tensor:
    """Launch the second backward pass: gradient of y, (R, C)."""
    tiles, constants = _tile(y)
    grad_y = torch.empty_like(y)
    launch(
        _backward_y_kernel,
        (triton.cdiv(y.shape[0], BLOCK_ROWS), tiles),
        grad_x,
        y,
        mean,
        var,
        weight,
        averages,
        grad_y,
        count,
        y.shape[0],
        EPS=eps,
        **constants,
    )
    return grad_y
