"""The attention that both layers share: a gate of query and key decides how much of each value passes."""

from __future__ import annotations

import torch
from torch import nn

from ..batch_norm import update_running
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
    norm: nn.BatchNorm1d,
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
        norm: BatchNorm over all E·M rows; in training its running statistics are updated.
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
    total = num_edges * num_keys
    if norm.training:
        if total < 2:
            raise ValueError(f"batch statistics need at least 2 rows, got {total}")
        norm.num_batches_tracked += 1
    if backend == "torch":
        return gated_attention_reference(
            x, weight, near, far, Rows(x_rows, near_rows, far_rows, count), key, value, norm
        )
    check_channels(channels)
    if x_rows is not None:
        x = gather_rows(x, x_rows, backend=backend).view(num_edges, num_keys, channels)
    dtype = compute_dtype(x)
    wide = accumulator_dtype(dtype)
    out, _, mean, var = _gated_attention(
        x.to(dtype).contiguous(),
        weight.to(dtype),
        near.to(dtype).contiguous(),
        *((None, None, None) if near_rows is None else (near_rows.index, near_rows.order, near_rows.ptr)),
        far.to(dtype).contiguous(),
        far_rows.index,
        far_rows.order,
        far_rows.ptr,
        count,
        key.weight.to(dtype),
        key.bias.to(wide),
        value.weight.to(dtype),
        value.bias.to(wide),
        norm.weight.to(wide),
        norm.bias.to(wide),
        norm.running_mean.to(wide),
        norm.running_var.to(wide),
        norm.training,
        norm.eps,
    )
    if norm.training:
        if count is not None:
            total = (count * num_keys).to(wide)
        update_running(norm, mean, var * (total / (total - 1)))
    return out


@torch.library.custom_op("mgt_fast::gated_attention", mutates_args=())
def _gated_attention(
    x: torch.Tensor,
    weight: torch.Tensor,
    near: torch.Tensor,
    near_index: torch.Tensor | None,
    near_order: torch.Tensor | None,
    near_ptr: torch.Tensor | None,
    far: torch.Tensor,
    far_index: torch.Tensor,
    far_order: torch.Tensor,
    far_ptr: torch.Tensor,
    count: torch.Tensor | None,
    key_w: torch.Tensor,
    key_b: torch.Tensor,
    value_w: torch.Tensor,
    value_b: torch.Tensor,
    norm_w: torch.Tensor,
    norm_b: torch.Tensor,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    training: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sum (E, C), the keys (E, M, C), and mean and biased variance of the products, (C,) each."""
    from .triton import forward_keys, forward_values

    rows = (x, weight, near, near_index, far, far_index)
    keys, mean, var = forward_keys(*rows, key_w, key_b, training, count)
    if not training:
        mean, var = running_mean.clone(), running_var.clone()
    out = forward_values(*rows, value_w, value_b, keys, mean, (var + eps).rsqrt(), norm_w, norm_b)
    return out, keys, mean, var


@_gated_attention.register_fake
def _(
    x, weight, near, near_index, near_order, near_ptr, far, far_index, far_order, far_ptr, count,
    key_w, key_b, *_,
):  # fmt: skip
    return x.new_empty(x.shape[0], x.shape[2]), torch.empty_like(x), *(torch.empty_like(key_b) for _ in "mv")


@torch.library.custom_op("mgt_fast::gated_attention_backward", mutates_args=())
def _gated_attention_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    near: torch.Tensor,
    near_index: torch.Tensor | None,
    near_order: torch.Tensor | None,
    near_ptr: torch.Tensor | None,
    far: torch.Tensor,
    far_index: torch.Tensor,
    far_order: torch.Tensor,
    far_ptr: torch.Tensor,
    count: torch.Tensor | None,
    key_w: torch.Tensor,
    value_w: torch.Tensor,
    value_b: torch.Tensor,
    norm_w: torch.Tensor,
    norm_b: torch.Tensor,
    keys: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    training: bool,
    eps: float,
) -> list[torch.Tensor]:
    """Return the gradients of x, weight, near, far, and of weight and bias of key, value and norm."""
    from .triton import backward

    grad_x, grad_weight, grad_near, grad_far, *others = backward(
        grad.contiguous(), x, weight, near, near_index, far, far_index, key_w, value_w, value_b,
        keys, mean, (var + eps).rsqrt(), norm_w, norm_b, training, count,
    )  # fmt: skip
    grad_far = sum_rows(grad_far, far_order, far_ptr, backend="triton").view_as(far)
    if near_index is not None:
        grad_near = sum_rows(grad_near, near_order, near_ptr, backend="triton")
    return [grad_x, grad_weight, grad_near, grad_far, *others]


@_gated_attention_backward.register_fake
def _(
    grad, x, weight, near, near_index, near_order, near_ptr, far, far_index, far_order, far_ptr, count,
    key_w, value_w, value_b, norm_w, norm_b, *_,
):  # fmt: skip
    like = (x, weight, near, far, key_w, value_b, value_w, value_b, norm_w, norm_b)
    return [torch.empty_like(tensor) for tensor in like]


def _setup_context(ctx, inputs, output):
    *rows, key_w, _, value_w, value_b, norm_w, norm_b, _, _, ctx.training, ctx.eps = inputs
    ctx.save_for_backward(*rows, key_w, value_w, value_b, norm_w, norm_b, *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    x, weight, near, far, *others = _gated_attention_backward(grad, *ctx.saved_tensors, ctx.training, ctx.eps)
    return (x, weight, near, None, None, None, far, None, None, None, None, *others, None, None, None, None)


_gated_attention.register_autograd(_backward, setup_context=_setup_context)
