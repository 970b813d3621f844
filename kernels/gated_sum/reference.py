"""Plain PyTorch `gated_sum`, with a backward pass that recomputes what is cheap to recompute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class _GatedSum(torch.autograd.Function):
    """Shapes: M keys a query, R queries, C channels."""

    @staticmethod
    def forward(ctx, pre, query, key_w, key_b, value_w, value_b, norm_w, norm_b, norm: nn.BatchNorm1d):
        channels = query.shape[1]
        hidden = F.silu(pre)  # [M, R, 2C]
        key = F.linear(hidden[..., :channels], key_w, key_b)  # [M, R, C]
        value = F.linear(hidden[..., channels:], value_w, value_b)  # [M, R, C]
        del hidden
        query = query * channels**-0.5
        gate, mean, inv_std = torch.native_batch_norm(
            (key * query).flatten(0, 1),
            norm_w,
            norm_b,
            norm.running_mean,
            norm.running_var,
            norm.training,
            norm.momentum,
            norm.eps,
        )
        if not norm.training:  # then torch returns no statistics
            mean, inv_std = norm.running_mean, (norm.running_var + norm.eps).rsqrt()
        ctx.save_for_backward(pre, query, key, value, key_w, value_w, norm_w, norm_b, mean, inv_std)
        ctx.training = norm.training
        return gate.sigmoid_().view_as(value).mul_(value).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        pre, query, key, value, key_w, value_w, norm_w, norm_b, mean, inv_std = ctx.saved_tensors
        channels, rows = query.shape[1], value.shape[0] * value.shape[1]
        standard = (key * query).sub_(mean).mul_(inv_std)  # the normalised product, [M, R, C]
        gate = (standard * norm_w).add_(norm_b).sigmoid_()
        grad_value = gate * grad
        # Gradient of the batch norm's output, in place of the gate: grad · value · gate · (1 − gate).
        grad_norm = gate.neg_().add_(1).mul_(grad_value).mul_(value)
        grad_norm_b = grad_norm.sum((0, 1))
        grad_norm_w = (grad_norm * standard).sum((0, 1))
        if ctx.training:
            standard.mul_(grad_norm_w / rows).add_(grad_norm_b / rows)
            grad_norm.sub_(standard)
        del standard
        grad_product = grad_norm.mul_(norm_w * inv_std)
        grad_query = (grad_product * key).sum(0).mul_(channels**-0.5)
        grad_key = grad_product.mul_(query)

        hidden = F.silu(pre)
        flat_hidden, flat_key, flat_value = (t.flatten(0, 1) for t in (hidden, grad_key, grad_value))
        grad_key_w = flat_key.t() @ flat_hidden[:, :channels]
        grad_value_w = flat_value.t() @ flat_hidden[:, channels:]
        grad_key_b, grad_value_b = flat_key.sum(0), flat_value.sum(0)
        grad_hidden = hidden  # its values have been used
        torch.mm(flat_key, key_w, out=flat_hidden[:, :channels])
        torch.mm(flat_value, value_w, out=flat_hidden[:, channels:])
        grad_pre = torch.ops.aten.silu_backward(grad_hidden, pre)
        return (
            grad_pre,
            grad_query,
            grad_key_w,
            grad_key_b,
            grad_value_w,
            grad_value_b,
            grad_norm_w,
            grad_norm_b,
            None,
        )


def gated_sum(
    pre: torch.Tensor, query: torch.Tensor, key: nn.Linear, value: nn.Linear, norm: nn.BatchNorm1d
) -> torch.Tensor:
    """Sum over m of v_m · sigmoid(BN(q · k_m / √C)), with k and v the second layers of the two MLPs.

    Args:
        pre: first layers before their SiLU, key and value part side by side, (M, R, 2C).
        query: q, (R, C).
        key, value: second layers of the key and value MLPs, C → C.
        norm: BatchNorm over all M·R rows; in training its running statistics are updated.

    Returns:
        (R, C).

    Raises:
        ValueError: in training with a single row, whose statistics do not exist (as torch's BatchNorm).

    Source:
        arXiv 2507.15303, edge-wise and node-wise attention.
    """
    if norm.training:
        if pre.shape[0] * pre.shape[1] < 2:
            raise ValueError(f"batch statistics need at least 2 rows, got {pre.shape[0] * pre.shape[1]}")
        norm.num_batches_tracked += 1
    return _GatedSum.apply(
        pre, query, key.weight, key.bias, value.weight, value.bias, norm.weight, norm.bias, norm
    )
