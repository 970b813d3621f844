"""Triton kernels of `rbf_embedding`.

    kernel            per row of C channels and K centres        arithmetic               traffic (numbers)
    embed             Σ over the 2·reach + 1 nearest centres     (2·reach + 1) · 2 C      C
    row gradient      the same for SiLU's slope, or for ∂/∂x     (2·reach + 1) · 2 C      2 C
    weight gradient   basisᵀ @ gradient, on tensor cores         2 C K                    1 C, softplus 2 C

The forward pass reads rows of the transposed weight from the caches, so that its write is what it waits for.
In the weight's gradient all K centres of all rows meet: there the dense product is cheaper than scattered
sums and needs no atomics. The basis is made in registers, each program sums over its own rows, and the
programs' sums are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..activations_triton import silu, silu_slope, softplus, softplus_slope
from ..launch import launch
from ..precision import accumulator_dtype, dot_precision

REACH = {torch.float64: 6, torch.float32: 4, torch.bfloat16: 3}
"""Spacings on each side of a value that matter: what is farther is below exp(−(reach + 1/2)²)."""

TILE = 2048  # numbers of the output a program makes
PROGRAMS = 132  # of the weight gradient, as many as a large GPU has multiprocessors


@triton.jit
def _gaussian(x, center, SPACING: tl.constexpr):
    scaled = (x - center) / SPACING
    return tl.exp(-scaled * scaled)


@triton.jit
def _first_center(x, centers, K: tl.constexpr, WIDTH: tl.constexpr, SPACING: tl.constexpr):
    """First of the WIDTH centres around each value; a value that is no number gets some."""
    position = (x - tl.load(centers)) / SPACING
    position = tl.where(position > 0, position, 0)
    position = tl.where(position < K - 1, position, K - 1)
    first = (position + 0.5).to(tl.int32) - WIDTH // 2
    return tl.minimum(tl.maximum(first, 0), K - WIDTH)


@triton.jit
def _linear(
    x, first, table, bias, centers, channel,
    C: tl.constexpr, WIDTH: tl.constexpr, SPACING: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Linear(RBF(x)) from rows of the transposed weight, [BLOCK_R, C]."""
    acc = tl.zeros((x.shape[0], C), ACC)
    for k in tl.static_range(WIDTH):
        basis = _gaussian(x, tl.load(centers + first + k), SPACING).to(ACC)
        acc += basis[:, None] * tl.load(table + (first + k)[:, None] * C + channel[None, :]).to(ACC)
    return acc + tl.load(bias + channel).to(ACC)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _embed_kernel(
    x, table, bias, centers, out, num_rows,
    C: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, SPACING: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, C)
    value = tl.load(x + row, mask=row < num_rows, other=0)
    first = _first_center(value, centers, K, WIDTH, SPACING)
    y = _linear(value, first, table, bias, centers, channel, C, WIDTH, SPACING, ACC)
    if ACTIVATION == "softplus":
        y = softplus(y)
    if ACTIVATION == "silu":
        y = silu(y)
    tl.store(out + row[:, None] * C + channel[None, :], y, mask=(row < num_rows)[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _row_gradient_kernel(
    grad, out, x, table, bias, centers, grad_linear, grad_x, num_rows,
    C: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, SPACING: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of the linear map's result, of x, or both; the one whose pointer is None is left out."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < num_rows
    channel = tl.arange(0, C)
    place = row[:, None] * C + channel[None, :]
    value = tl.load(x + row, mask=inside, other=0)
    first = _first_center(value, centers, K, WIDTH, SPACING)
    slope = tl.load(grad + place, mask=inside[:, None], other=0).to(ACC)
    if ACTIVATION == "softplus":
        slope *= softplus_slope(tl.load(out + place, mask=inside[:, None], other=0).to(ACC))
    if ACTIVATION == "silu":
        slope *= silu_slope(_linear(value, first, table, bias, centers, channel, C, WIDTH, SPACING, ACC))
    if grad_linear is not None:
        tl.store(grad_linear + place, slope, mask=inside[:, None])
    if grad_x is not None:
        total = tl.zeros((BLOCK_R,), ACC)
        for k in tl.static_range(WIDTH):
            center = tl.load(centers + first + k)
            along = tl.load(table + (first + k)[:, None] * C + channel[None, :]).to(ACC)
            steepness = (_gaussian(value, center, SPACING) * (value - center)).to(ACC)
            total -= steepness * tl.sum(along * slope, 1)
        tl.store(grad_x + row, total * (2 / (SPACING * SPACING)), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "rows_each"])
def _weight_gradient_kernel(
    grad, out, x, centers, weight_sums, bias_sums, num_rows, rows_each,
    C: tl.constexpr, K: tl.constexpr, SPACING: tl.constexpr, FROM_VALUE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the transposed weight's gradient, summed over `rows_each` rows.

    FROM_VALUE: `grad` is that of softplus, and `out` its value; otherwise `grad` is that of the linear map.
    """
    part = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    center = tl.load(centers + k, mask=k < K, other=0)
    acc = tl.zeros((BLOCK_K, BLOCK_C), ACC)
    bias_acc = tl.zeros((BLOCK_C,), ACC)
    end = tl.minimum((part + 1) * rows_each, num_rows)
    for start in range(part * rows_each, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = row < end
        place = row[:, None] * C + channel[None, :]
        slope = tl.load(grad + place, mask=inside[:, None], other=0).to(ACC)
        if FROM_VALUE:
            slope *= softplus_slope(tl.load(out + place, mask=inside[:, None], other=0).to(ACC))
        basis = _gaussian(tl.load(x + row, mask=inside, other=0)[None, :], center[:, None], SPACING)
        factor = slope.to(grad.dtype.element_ty)
        acc = tl.dot(basis.to(factor.dtype), factor, acc, input_precision=PRECISION, out_dtype=ACC)
        if tl.program_id(1) == 0:
            bias_acc += tl.sum(slope, 0)
    place = (part * K + k)[:, None] * C + channel[None, :]
    tl.store(weight_sums + place, acc, mask=(k < K)[:, None])
    if tl.program_id(1) == 0:
        tl.store(bias_sums + part * C + channel, bias_acc)


def _table(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of the transposed weight in the factors' type, (K, C)."""
    return weight.t().to(dtype).contiguous()


def _row_constants(weight, spacing: float, activation: str | None, dtype: torch.dtype) -> dict:
    channels, num_centers = weight.shape
    return {
        "C": channels,
        "K": num_centers,
        "WIDTH": min(2 * REACH[dtype] + 1, num_centers),
        "SPACING": spacing,
        "ACTIVATION": activation,
        "BLOCK_R": min(TILE // channels, 64),
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def forward(x, weight, bias, centers, spacing: float, activation: str | None, dtype: torch.dtype):
    """Launch the forward pass, (R,) → (R, C) of type `dtype`."""
    constants = _row_constants(weight, spacing, activation, dtype)
    out = x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)
    grid = (triton.cdiv(x.shape[0], constants["BLOCK_R"]),)
    launch(
        _embed_kernel,
        grid,
        x.contiguous(),
        _table(weight, dtype),
        bias,
        centers,
        out,
        x.shape[0],
        **constants,
    )
    return out


def _weight_gradient(grad, out, x, weight, bias, centers, spacing: float) -> list[torch.Tensor]:
    num_rows, (channels, num_centers) = x.shape[0], weight.shape
    wide = accumulator_dtype(grad.dtype)
    block_k = min(max(triton.next_power_of_2(num_centers), 16), 128)
    block_c, block_r = (256, 32) if grad.dtype == torch.bfloat16 else (128, 16)
    block_c = min(channels, block_c)
    tiles = (triton.cdiv(num_centers, block_k), channels // block_c)
    parts = min(max(PROGRAMS // (tiles[0] * tiles[1]), 1), triton.cdiv(num_rows, 4 * block_r))
    rows_each = triton.cdiv(triton.cdiv(num_rows, block_r), max(parts, 1)) * block_r
    weight_sums = x.new_empty(parts, num_centers, channels, dtype=wide)
    bias_sums = x.new_empty(parts, channels, dtype=wide)
    launch(
        _weight_gradient_kernel,
        (parts, *tiles),
        grad,
        out,
        x,
        centers,
        weight_sums,
        bias_sums,
        num_rows,
        rows_each,
        C=channels,
        K=num_centers,
        SPACING=spacing,
        FROM_VALUE=out is not None,
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        BLOCK_R=block_r,
        ACC=tl.float64 if wide == torch.float64 else tl.float32,
        PRECISION=dot_precision(),
        num_warps=8,
        num_stages=3,
    )
    return [weight_sums.sum(0).t().to(weight.dtype).contiguous(), bias_sums.sum(0).to(bias.dtype)]


def backward(
    grad,
    out,
    x,
    weight,
    bias,
    centers,
    spacing: float,
    activation: str | None,
    wants_x: bool,
    wants_parameters,
) -> list[torch.Tensor]:
    """Launch the backward pass: the gradient of x and those of weight and bias, where wanted.

    `out` is the forward pass' result if the activation is softplus, else None.
    """
    x = x.contiguous()
    grad_x = torch.empty_like(x) if wants_x else None
    grad_linear = torch.empty_like(grad) if activation == "silu" and wants_parameters else None
    if wants_x or grad_linear is not None:
        constants = _row_constants(weight, spacing, activation, grad.dtype)
        launch(
            _row_gradient_kernel,
            (triton.cdiv(x.shape[0], constants["BLOCK_R"]),),
            grad,
            out,
            x,
            _table(weight, grad.dtype),
            bias,
            centers,
            grad_linear,
            grad_x,
            x.shape[0],
            **constants,
        )
    grads = [grad_x] if wants_x else []
    if wants_parameters:
        grads += _weight_gradient(
            grad if grad_linear is None else grad_linear, out, x, weight, bias, centers, spacing
        )
    return grads
