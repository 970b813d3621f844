"""The gate of `gated_attention` in plain PyTorch: value times sigmoid of a batch-normalised product.

Autograd alone would keep some twelve (R, M, C) arrays a layer; here four are kept (the first layers' sums,
keys and values) and everything else is made again in the backward pass. On a CPU both passes walk over
chunks of rows that stay in cache, which costs no arithmetic and saves most of the memory traffic.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

CPU_CHUNK = 1 << 18  # numbers in one array of a chunk: 1 MiB in float32


def _chunks(rows: int, row_size: int, device: torch.device) -> Iterator[slice]:
    step = max(CPU_CHUNK // row_size, 1) if device.type == "cpu" else max(rows, 1)
    return (slice(start, start + step) for start in range(0, rows, step))


class _GatedSum(torch.autograd.Function):
    """Shapes: R queries, M keys a query, C channels."""

    @staticmethod
    def forward(ctx, pre, query, key_w, key_b, value_w, value_b, norm_w, norm_b, norm: nn.BatchNorm1d):
        num_rows, num_keys, channels = *pre.shape[:2], query.shape[1]
        chunks = list(_chunks(num_rows, num_keys * channels, pre.device))
        wide = norm_b.dtype  # statistics and gates keep it where the factors are narrower
        query = (query.to(wide) * channels**-0.5)[:, None]
        key, value = pre.new_empty(2, num_rows, num_keys, channels)
        count, mean, square = 0, torch.zeros_like(norm_b), torch.zeros_like(norm_b)
        for rows in chunks:
            hidden = F.silu(pre[rows]).flatten(0, 1)
            torch.addmm(key_b, hidden[:, :channels], key_w.t(), out=key[rows].flatten(0, 1))
            torch.addmm(value_b, hidden[:, channels:], value_w.t(), out=value[rows].flatten(0, 1))
            if norm.training:  # merge this chunk's mean and summed squares (Chan et al. 1979)
                product = (key[rows] * query[rows]).flatten(0, 1)
                new = product.shape[0]
                delta = product.mean(0).sub_(mean)
                mean = mean + delta * (new / (count + new))
                square += product.sub_(product.mean(0)).square_().sum(0)
                square += delta.square_().mul_(count * new / (count + new))
                count += new
        if norm.training:
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
            norm.running_var.lerp_((square / (count - 1)).to(norm.running_var.dtype), norm.momentum)
            inv_std = (square / count + norm.eps).rsqrt()
        else:
            mean, inv_std = norm.running_mean.clone(), (norm.running_var + norm.eps).rsqrt()
        ctx.save_for_backward(pre, query, key, value, key_w, value_w, norm_w, norm_b, mean, inv_std)
        ctx.training = norm.training

        out = pre.new_empty(num_rows, channels)
        for rows in chunks:
            gate = _standardise(key[rows], query[rows], mean, inv_std).mul_(norm_w).add_(norm_b).sigmoid_()
            torch.sum(gate.mul_(value[rows]), 1, dtype=out.dtype, out=out[rows])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        pre, query, key, value, key_w, value_w, norm_w, norm_b, mean, inv_std = ctx.saved_tensors
        num_rows, num_keys, channels = value.shape
        chunks = list(_chunks(num_rows, num_keys * channels, pre.device))

        def before_gate(rows):
            """Return the normalised product, the gate · grad, and the gradient of the norm's output."""
            standard = _standardise(key[rows], query[rows], mean, inv_std)
            gate = (standard * norm_w).add_(norm_b).sigmoid_()
            grad_value = gate * grad[rows, None]
            grad_norm = gate.neg_().add_(1).mul_(grad_value).mul_(value[rows])
            return standard, grad_value, grad_norm

        grad_norm_w, grad_norm_b = torch.zeros_like(norm_w), torch.zeros_like(norm_b)
        for rows in chunks:
            standard, _, grad_norm = before_gate(rows)
            grad_norm_b += grad_norm.sum((0, 1))
            grad_norm_w += grad_norm.mul_(standard).sum((0, 1))

        grad_pre, grad_query = torch.empty_like(pre), grad.new_empty(num_rows, channels)
        wide = norm_b.dtype
        grad_key_w, grad_value_w = (torch.zeros_like(w, dtype=wide) for w in (key_w, value_w))
        grad_key_b, grad_value_b = torch.zeros_like(norm_b), torch.zeros_like(norm_b)
        for rows in chunks:
            standard, grad_value, grad_norm = before_gate(rows)
            if ctx.training:  # the statistics depend on every row
                total = num_rows * num_keys
                grad_norm.sub_(standard.mul_(grad_norm_w / total).add_(grad_norm_b / total))
            grad_product = grad_norm.mul_(norm_w * inv_std)
            torch.sum(grad_product * key[rows], 1, dtype=grad_query.dtype, out=grad_query[rows])
            flat_key = grad_product.mul_(query[rows]).flatten(0, 1)
            flat_value = grad_value.flatten(0, 1)
            grad_key_b += flat_key.sum(0)
            grad_value_b += flat_value.sum(0)
            flat_key, flat_value = flat_key.to(pre.dtype), flat_value.to(pre.dtype)
            hidden = F.silu(pre[rows]).flatten(0, 1)
            _add_product(grad_key_w, flat_key.t(), hidden[:, :channels])
            _add_product(grad_value_w, flat_value.t(), hidden[:, channels:])
            grad_hidden = hidden  # its values have been used
            torch.mm(flat_key, key_w, out=grad_hidden[:, :channels])
            torch.mm(flat_value, value_w, out=grad_hidden[:, channels:])
            torch.ops.aten.silu_backward(grad_hidden.view_as(pre[rows]), pre[rows], grad_input=grad_pre[rows])
        grad_query.mul_(channels**-0.5)
        return (
            grad_pre,
            grad_query,
            grad_key_w.to(key_w.dtype),
            grad_key_b,
            grad_value_w.to(value_w.dtype),
            grad_value_b,
            grad_norm_w,
            grad_norm_b,
            None,
        )


def _add_product(total, a, b):
    """Add a @ b to a total that may be of a wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _standardise(key, query, mean, inv_std):
    return (key * query).sub_(mean).mul_(inv_std)


def gated_sum(
    pre: torch.Tensor, query: torch.Tensor, key: nn.Linear, value: nn.Linear, norm: nn.BatchNorm1d
) -> torch.Tensor:
    """Sum over m of v_m · sigmoid(BN(q · k_m / √C)), with k and v the second layers of the two MLPs.

    Args:
        pre: first layers before their SiLU, key and value part side by side, (R, M, 2C).
        query: q, (R, C).
        key, value: second layers of the key and value MLPs, C → C.
        norm: BatchNorm over all R·M rows; in training its running mean and variance are updated.

    Returns:
        (R, C).
    """
    # Under autocast pre and query come in bfloat16; the products follow them.
    weights = (p.to(pre.dtype) for p in (key.weight, key.bias, value.weight, value.bias))
    return _GatedSum.apply(pre, query, *weights, norm.weight, norm.bias, norm)
