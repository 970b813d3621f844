"""Residual, BatchNorm and softplus in one pass over the rows, after one for the statistics."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ..batch_norm import BatchNorm, Moments
from ..precision import accumulator_dtype, compute_dtype
from .reference import residual_norm as residual_norm_reference

__all__ = ["residual_norm"]


def residual_norm(
    x: torch.Tensor,
    y: torch.Tensor,
    norm: BatchNorm,
    *,
    count: torch.Tensor | None = None,
    backend: str = "torch",
) -> torch.Tensor:
    """softplus(x + BatchNorm(y)), (R, C); see `reference.residual_norm` for the arguments.

    With Triton the result is bfloat16 under autocast; statistics are float32 or better.

    Raises:
        ValueError: in training with fewer than two rows, whose statistics do not exist.
    """
    if backend == "torch":
        return residual_norm_reference(x, y, norm, count)
    norm.require_rows(y.shape[0])
    dtype = compute_dtype(x)
    wide = accumulator_dtype(dtype)
    x, y = x.to(dtype).contiguous(), y.to(dtype).contiguous()
    return _ResidualNorm.apply(x, y, norm.weight.to(wide), norm.bias.to(wide), count, norm)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weight, bias, count, norm):
        moments = norm.known(weight.dtype)
        if moments is None:
            _, mean, var = _merge_statistics(_partial_statistics(y, count))
            moments = norm.settle(Moments(y.shape[0] if count is None else count, mean, var))
        out = _forward(x, y, moments.mean, moments.var, weight, bias, norm.eps)
        ctx.save_for_backward(out, y, moments.mean, moments.var, weight, count)
        ctx.norm, ctx.training, ctx.total = norm, norm.training, moments.count
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        out, y, mean, var, weight, count = ctx.saved_tensors
        grad_x, parts = _backward_sums(grad, out, y, mean, var, ctx.norm.eps)
        sums = parts.sum(0)
        averages = ctx.norm.total(sums) / ctx.total if ctx.training else None
        grad_y = _backward_y(grad_x, y, mean, var, weight, averages, ctx.norm.eps, count)
        grad_bias, grad_weight = sums
        return grad_x, grad_y, grad_weight, grad_bias, None, None


MAX_PARTS, ROWS_A_PART = 512, 64


def _num_parts(num_rows: int) -> int:
    """Programs that each sum over their own share of the rows: enough to keep a large GPU's memory busy."""
    return max(1, min(-(-num_rows // ROWS_A_PART), MAX_PARTS))


@torch.library.custom_op("mgt_fast::partial_statistics", mutates_args=())
def _partial_statistics(y: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
    """Count, mean and biased variance over each of P parts of the rows that count, (R, C) → (P, 3, C)."""
    from .triton import partial_statistics

    return partial_statistics(y, _num_parts(y.shape[0]), count)


@_partial_statistics.register_fake
def _(y, count=None):
    return y.new_empty(_num_parts(y.shape[0]), 3, y.shape[1], dtype=accumulator_dtype(y.dtype))


@torch.library.custom_op("mgt_fast::merge_statistics", mutates_args=())
def _merge_statistics(parts: torch.Tensor) -> torch.Tensor:
    """Merge count, mean and biased variance of parts of the rows, (P, 3, C) → (3, C)."""
    from .triton import merge_statistics

    return merge_statistics(parts)


@_merge_statistics.register_fake
def _(parts):
    return parts.new_empty(parts.shape[1:])


@torch.library.custom_op("mgt_fast::residual_norm", mutates_args=())
def _forward(
    x: torch.Tensor,
    y: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """softplus(x + BatchNorm(y)) by given moments."""
    from .triton import forward

    return forward(x, y, mean, var, weight, bias, eps)


@_forward.register_fake
def _(x, y, *_):
    return torch.empty_like(y)


@torch.library.custom_op("mgt_fast::residual_norm_backward_sums", mutates_args=())
def _backward_sums(
    grad: torch.Tensor, out: torch.Tensor, y: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient g of x, (R, C), and the sums of g and g · ŷ over each of P parts of the rows, (P, 2, C)."""
    from .triton import backward_sums

    return backward_sums(grad.contiguous(), out, y, mean, var, eps, _num_parts(y.shape[0]))


@_backward_sums.register_fake
def _(grad, out, y, mean, var, eps):
    return torch.empty_like(y), mean.new_empty(_num_parts(y.shape[0]), 2, mean.shape[0])


@torch.library.custom_op("mgt_fast::residual_norm_backward_y", mutates_args=())
def _backward_y(
    grad_x: torch.Tensor,
    y: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor,
    averages: torch.Tensor | None,
    eps: float,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of y, (R, C); `averages` of g and g · ŷ over rows that count, (2, C), if y made mean, var."""
    from .triton import backward_y

    return backward_y(grad_x, y, mean, var, weight, averages, eps, count)


@_backward_y.register_fake
def _(grad_x, y, *_):
    return torch.empty_like(y)
