"""The attention that both layers share: a gate of query and key decides how much of each value passes."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..batch_norm import BatchNorm, Moments
from ..launch import check_channels
from ..precision import accumulator_dtype, compute_dtype
from ..segment_sum import sum_rows
from ..segments import Segments, gather_rows
from .reference import Rows
from .reference import gated_attention as gated_attention_reference

__all__ = ["gated_attention"]


def gated_attention(
    x: torch.Tensor,
    weight: torch.Tensor,
    near: torch.Tensor,
    near_rows: Segments | None,
    far: torch.Tensor,
    far_rows: Segments,
    key: nn.Linear,
    value: nn.Linear,
    norm: BatchNorm,
    *,
    x_rows: Segments | None = None,
    count: torch.Tensor | None = None,
    backend: str = "torch",
) -> torch.Tensor:
    """Sum over an edge's M keys of v_m · sigmoid(BN(q · k_m / √C)).

    k_m and v_m are two-layer networks with a SiLU between. Their first layers act on a concatenation, that is
    a sum of three terms: of the (edge, m) itself, of its near row and of its far row.

    Args:
        x: what each (edge, m) brings itself, (E, M, C).
        weight: its map to the first layers of key and value, (2C, C).
        near: queries, and what the near row adds to the first layers of key and value, (n, 3C).
        near_rows: near row of each edge; None if row e belongs to edge e.
        far: what the far row adds to the first layers of key and value, (n, M, 2C).
        far_rows: far row of each edge.
        key, value: second layers of the two networks, C → C.
        norm: BatchNorm over all E·M rows, and others if it has `statistics`; in training its running
            statistics are updated.
        x_rows: where (edge, m) share their rows of x, the row of each, E·M of them, and x is (n, C).
        count: number of edges that the statistics are taken over, the first ones; 0-dim int64 on the device.
            The others are padding: what they give has no meaning, and its gradient must be zero. Absent, all
            edges count.
        backend: "torch" or "triton".

    Returns:
        (E, C), in bfloat16 under autocast.

    Raises:
        ValueError: in training with a single row, whose statistics do not exist (as torch's BatchNorm); with
            Triton for a number of channels that is no power of two from 16 to 512.

    Source:
        arXiv 2507.15303, edge-wise and node-wise attention.
    """
    num_edges, num_keys, channels = far_rows.index.shape[0], *far.shape[1:]
    channels //= 2
    norm.require_rows(num_edges * num_keys)
    if backend == "torch":
        return gated_attention_reference(
            x, weight, near, far, Rows(x_rows, near_rows, far_rows, count), key, value, norm
        )
    check_channels(channels)
    if x_rows is not None:
        x = gather_rows(x, x_rows, backend=backend).view(num_edges, num_keys, channels)
    dtype = compute_dtype(x)
    wide = accumulator_dtype(dtype)
    return _GatedAttention.apply(
        x.to(dtype).contiguous(),
        weight.to(dtype),
        near.to(dtype).contiguous(),
        far.to(dtype).contiguous(),
        key.weight.to(dtype),
        key.bias.to(wide),
        value.weight.to(dtype),
        value.bias.to(wide),
        norm.weight.to(wide),
        norm.bias.to(wide),
        Rows(None, near_rows, far_rows, count),
        norm,
    )


class _GatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, near, far, key_w, key_b, value_w, value_b, norm_w, norm_b, rows, norm):
        inputs = (x, weight, near, None if rows.near is None else rows.near.index, far, rows.far.index)
        moments = norm.known(norm_w.dtype)
        keys, *found = _keys(*inputs, key_w, key_b, moments is None, rows.count)
        if moments is None:
            edges, num_keys = x.shape[0] if rows.count is None else rows.count, x.shape[1]
            moments = norm.settle(Moments(edges * num_keys, *found))
        statistics = (moments.mean, (moments.var + norm.eps).rsqrt())
        out = _values(*inputs, value_w, value_b, keys, *statistics, norm_w, norm_b)
        ctx.save_for_backward(
            x, weight, near, far, key_w, value_w, value_b, keys, *statistics, norm_w, norm_b
        )
        ctx.rows, ctx.norm, ctx.training, ctx.total = rows, norm, norm.training, moments.count
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, near, far, key_w, value_w, value_b, *normalising = ctx.saved_tensors
        rows = ctx.rows
        inputs = (x, weight, near, None if rows.near is None else rows.near.index, far, rows.far.index)
        edges, num_keys, channels = x.shape
        grad_near = near.new_empty(edges, 3 * channels)
        grad_pre = near.new_empty(edges * num_keys, 2 * channels) if num_keys > 1 else None
        grad_norm, grad_value_w, sums = _backward_values(
            grad.contiguous(), grad_near, grad_pre, *inputs, value_w, value_b, *normalising
        )
        averages = ctx.norm.total(sums[:2]) / ctx.total if ctx.training else torch.zeros_like(sums[:2])
        grad_x, grad_weight, grad_key_w, grad_key_b = _backward_keys(
            grad_norm, grad_near, grad_pre, *inputs, key_w, *normalising[:-1], averages, rows.count
        )
        first = grad_near[:, channels:] if grad_pre is None else grad_pre.view(edges, num_keys * 2 * channels)
        grad_far = sum_rows(first, rows.far.order, rows.far.ptr, backend="triton").view_as(far)
        if rows.near is not None:
            grad_near = sum_rows(grad_near, rows.near.order, rows.near.ptr, backend="triton")
        grad_norm_b, grad_norm_w, grad_value_b = sums
        return (
            grad_x, grad_weight, grad_near, grad_far, grad_key_w, grad_key_b, grad_value_w, grad_value_b,
            grad_norm_w, grad_norm_b, None, None,
        )  # fmt: skip


@torch.library.custom_op("mgt_fast::gated_attention_keys", mutates_args=())
def _keys(
    x: torch.Tensor,
    weight: torch.Tensor,
    near: torch.Tensor,
    near_index: torch.Tensor | None,
    far: torch.Tensor,
    far_index: torch.Tensor,
    key_w: torch.Tensor,
    key_b: torch.Tensor,
    statistics: bool,
    count: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Return the keys (E, M, C) and, if wanted, mean and biased variance of the products, (C,) each."""
    from .triton import forward_keys

    return forward_keys(x, weight, near, near_index, far, far_index, key_w, key_b, statistics, count)


@_keys.register_fake
def _(x, weight, near, near_index, far, far_index, key_w, key_b, statistics, count):
    return [torch.empty_like(x), *(torch.empty_like(key_b) for _ in "mv" if statistics)]


@torch.library.custom_op("mgt_fast::gated_attention_values", mutates_args=())
def _values(
    x: torch.Tensor,
    weight: torch.Tensor,
    near: torch.Tensor,
    near_index: torch.Tensor | None,
    far: torch.Tensor,
    far_index: torch.Tensor,
    value_w: torch.Tensor,
    value_b: torch.Tensor,
    keys: torch.Tensor,
    mean: torch.Tensor,
    inv_std: torch.Tensor,
    norm_w: torch.Tensor,
    norm_b: torch.Tensor,
) -> torch.Tensor:
    """Return the gated values' sum over each edge's keys, (E, C)."""
    from .triton import forward_values

    rows = (x, weight, near, near_index, far, far_index)
    return forward_values(*rows, value_w, value_b, keys, mean, inv_std, norm_w, norm_b)


@_values.register_fake
def _(x, *_):
    return x.new_empty(x.shape[0], x.shape[2])


@torch.library.custom_op("mgt_fast::gated_attention_backward_values", mutates_args=("grad_near", "grad_pre"))
def _backward_values(
    grad: torch.Tensor,
    grad_near: torch.Tensor,
    grad_pre: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    near: torch.Tensor,
    near_index: torch.Tensor | None,
    far: torch.Tensor,
    far_index: torch.Tensor,
    value_w: torch.Tensor,
    value_b: torch.Tensor,
    keys: torch.Tensor,
    mean: torch.Tensor,
    inv_std: torch.Tensor,
    norm_w: torch.Tensor,
    norm_b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the first half of the backward pass; see `triton.backward_values`."""
    from .triton import backward_values

    rows = (x, weight, near, near_index, far, far_index)
    statistics = (mean, inv_std, norm_w, norm_b)
    return backward_values(grad, grad_near, grad_pre, *rows, value_w, value_b, keys, *statistics)


@_backward_values.register_fake
def _(grad, grad_near, grad_pre, x, weight, near, near_index, far, far_index, value_w, value_b, *_):
    _, num_keys, channels = x.shape
    grad_norm = x.new_empty(x.shape[0] * num_keys, channels)
    return grad_norm, torch.empty_like(value_w), value_b.new_empty(3, channels)


@torch.library.custom_op(
    "mgt_fast::gated_attention_backward_keys", mutates_args=("grad_norm", "grad_near", "grad_pre")
)
def _backward_keys(
    grad_norm: torch.Tensor,
    grad_near: torch.Tensor,
    grad_pre: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    near: torch.Tensor,
    near_index: torch.Tensor | None,
    far: torch.Tensor,
    far_index: torch.Tensor,
    key_w: torch.Tensor,
    keys: torch.Tensor,
    mean: torch.Tensor,
    inv_std: torch.Tensor,
    norm_w: torch.Tensor,
    averages: torch.Tensor,
    count: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the second half of the backward pass; see `triton.backward_keys`."""
    from .triton import backward_keys

    rows = (x, weight, near, near_index, far, far_index)
    statistics = (mean, inv_std, norm_w, averages)
    return backward_keys(grad_norm, grad_near, grad_pre, *rows, key_w, keys, *statistics, count)


@_backward_keys.register_fake
def _(grad_norm, grad_near, grad_pre, x, weight, near, near_index, far, far_index, key_w, keys, mean, *_):
    return tuple(torch.empty_like(tensor) for tensor in (x, weight, key_w, mean))
