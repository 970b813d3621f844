"""Plain PyTorch `gated_attention`.

Autograd alone would keep some twelve (E, M, C) arrays; here four are kept (the first layers' sums, keys and
values), or none where no gradient is asked for, and everything else is made again in the backward pass. On a
CPU both passes walk over chunks of edges that stay in cache, which costs no arithmetic and saves most of the
memory traffic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ..batch_norm import BatchNorm, Moments
from ..precision import accumulator_dtype, compute_dtype
from ..segment_sum import sum_rows
from ..segments import Segments

CPU_CHUNK = 1 << 18  # numbers in one array of a chunk: 1 MiB in float32


@dataclass(frozen=True)
class Rows:
    """Which rows of x, near and far belong to an edge, and which edges count; see `gated_attention`."""

    x: Segments | None
    near: Segments | None
    far: Segments
    count: torch.Tensor | None = None

    @cached_property
    def num_counted(self) -> int:
        """Edges that the statistics are taken over."""
        return self.far.index.shape[0] if self.count is None else int(self.count)


def gated_attention(
    x: torch.Tensor,
    weight: torch.Tensor,
    near: torch.Tensor,
    far: torch.Tensor,
    rows: Rows,
    key: nn.Linear,
    value: nn.Linear,
    norm: BatchNorm,
) -> torch.Tensor:
    """Sum over an edge's M keys of v_m · sigmoid(BN(q · k_m / √C)); see the public function."""
    dtype = compute_dtype(x)
    weights = (key.weight, key.bias, value.weight, value.bias)
    return _GatedAttention.apply(
        *(tensor.to(dtype) for tensor in (x, weight, near, far, *weights)),
        norm.weight,
        norm.bias,
        norm,
        rows,
        torch.is_grad_enabled(),
    )


def _chunks(num_edges: int, edge_size: int, device: torch.device) -> Iterator[slice]:
    step = max(CPU_CHUNK // edge_size, 1) if device.type == "cpu" else max(num_edges, 1)
    return [slice(start, min(start + step, num_edges)) for start in range(0, num_edges, step)]


class _GatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, near, far, key_w, key_b, value_w, value_b, norm_w, norm_b, norm, rows, keep):
        num_edges, num_keys, channels = rows.far.index.shape[0], far.shape[1], key_w.shape[0]
        scale, wide = channels**-0.5, accumulator_dtype(x.dtype)
        chunks = _chunks(num_edges, num_keys * channels, x.device)
        shared = None if rows.x is None else F.linear(x, weight)
        moments = norm.known(wide)
        room = num_edges if keep or moments is None else 0
        pre = x.new_empty(room if keep else 0, num_keys, 2 * channels)
        keys, values = x.new_empty(2, room, num_keys, channels)
        out = x.new_empty(num_edges, channels)

        def gate(edges, centred, value):
            gate = torch.addcmul(norm_b.to(wide), centred, slope).sigmoid_()
            torch.sum(gate.mul_(value), 1, dtype=out.dtype, out=out[edges])

        if moments is not None:
            mean, inv_std = moments.mean, (moments.var + norm.eps).rsqrt()
            slope = inv_std * norm_w
        count, batch_mean, square = 0, *torch.zeros(2, channels, dtype=wide, device=x.device)
        for edges in chunks:
            near_e = _take(near, rows.near, edges)  # [e, 3C]
            if shared is None:
                sums = F.linear(x[edges], weight)  # [e, M, 2C]
            else:
                row = rows.x.index.view(num_edges, num_keys)[edges]
                sums = shared.index_select(0, row.flatten()).view(*row.shape, -1)
            sums += near_e[:, None, channels:]
            sums += _take(far, rows.far, edges)
            if keep:
                pre[edges] = sums
            hidden = F.silu(sums, inplace=True).flatten(0, 1)
            key = torch.addmm(key_b, hidden[:, :channels], key_w.t()).view(-1, num_keys, channels)
            value = torch.addmm(value_b, hidden[:, channels:], value_w.t()).view(-1, num_keys, channels)
            if room:
                keys[edges], values[edges] = key, value
            product = key.to(wide) * (near_e[:, None, :channels].to(wide) * scale)
            if moments is not None:
                gate(edges, product.sub_(mean), value)
                continue
            product = product[_counted(edges, rows)]
            new = product.shape[0] * num_keys  # merge the chunk's mean and summed squares (Chan et al. 1979)
            if not new:
                continue
            chunk_mean = product.mean((0, 1))
            delta = chunk_mean - batch_mean
            batch_mean = batch_mean + delta * (new / (count + new))
            square += product.sub_(chunk_mean).square_().sum((0, 1))
            square += delta.square_().mul_(count * new / (count + new))
            count += new

        if moments is None:
            moments = norm.settle(Moments(count, batch_mean, square / max(count, 1)))
            mean, inv_std = moments.mean, (moments.var + norm.eps).rsqrt()
            slope = inv_std * norm_w
            for edges in chunks:
                gate(
                    edges,
                    _centred(keys, _queries(near, rows, edges, scale, wide), edges, mean),
                    values[edges],
                )
        if keep:
            ctx.save_for_backward(
                x, weight, near, far, pre, keys, values, key_w, value_w, norm_w, norm_b, mean, inv_std
            )
            ctx.rows, ctx.norm, ctx.training, ctx.total = rows, norm, norm.training, moments.count
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, near, far, pre, keys, values, key_w, value_w, norm_w, norm_b, mean, inv_std = (
            ctx.saved_tensors
        )
        rows, (num_edges, num_keys, channels) = ctx.rows, keys.shape
        scale, wide = channels**-0.5, mean.dtype
        slope = inv_std * norm_w
        chunks = _chunks(num_edges, num_keys * channels, x.device)

        def before_gate(edges):
            """Return query, centred product, gate · grad, and the gradient of the norm's output."""
            query = _queries(near, rows, edges, scale, wide)
            centred = _centred(keys, query, edges, mean)
            gate = torch.addcmul(norm_b.to(wide), centred, slope).sigmoid_()
            grad_value = gate * grad[edges, None]
            grad_norm = torch.addcmul(grad_value, grad_value, gate, value=-1).mul_(values[edges])
            return query, centred, grad_value, grad_norm

        row_sums = torch.zeros(2, channels, dtype=wide, device=x.device)
        grad_norm_b, grad_slope = row_sums
        if ctx.training:  # the statistics depend on every row, so the sums are needed first
            for edges in chunks:
                _, centred, _, grad_norm = before_gate(edges)
                grad_norm_b += grad_norm.sum((0, 1))
                grad_slope += grad_norm.mul_(centred).sum((0, 1))
            shift, tilt = ctx.norm.total(row_sums)
            shift, tilt = shift / ctx.total, tilt * (inv_std.square() / ctx.total)

        grad_pre = torch.empty_like(pre)
        grad_x = torch.empty_like(x)
        grad_near = near.new_empty(num_edges, 3 * channels)
        grad_weight, grad_key_w, grad_value_w = (
            torch.zeros_like(w, dtype=wide) for w in (weight, key_w, value_w)
        )
        grad_key_b, grad_value_b = torch.zeros(2, channels, dtype=wide, device=x.device)
        for edges in chunks:
            query, centred, grad_value, grad_norm = before_gate(edges)
            if ctx.training:
                counted = _counted(edges, rows)
                grad_norm[counted].sub_(shift).sub_(centred[counted].mul_(tilt))
            else:
                grad_norm_b += grad_norm.sum((0, 1))
                grad_slope += centred.mul_(grad_norm).sum((0, 1))
            grad_product = grad_norm.mul_(slope)
            grad_near[edges, :channels] = (grad_product * keys[edges]).sum(1).mul_(scale)
            flat_key = grad_product.mul_(query).flatten(0, 1)
            flat_value = grad_value.flatten(0, 1)
            grad_key_b += flat_key.sum(0)
            grad_value_b += flat_value.sum(0)
            flat_key, flat_value = flat_key.to(x.dtype), flat_value.to(x.dtype)
            hidden = F.silu(pre[edges]).flatten(0, 1)
            _add_product(grad_key_w, flat_key.t(), hidden[:, :channels])
            _add_product(grad_value_w, flat_value.t(), hidden[:, channels:])
            grad_hidden = hidden  # its values have been used
            torch.mm(flat_key, key_w, out=grad_hidden[:, :channels])
            torch.mm(flat_value, value_w, out=grad_hidden[:, channels:])
            sums = grad_pre[edges]
            torch.ops.aten.silu_backward(grad_hidden.view_as(sums), pre[edges], grad_input=sums)
            torch.sum(sums, 1, out=grad_near[edges, channels:])
            if rows.x is None:
                torch.mm(sums.flatten(0, 1), weight, out=grad_x[edges].flatten(0, 1))
                _add_product(grad_weight, sums.flatten(0, 1).t(), x[edges].flatten(0, 1))
        if rows.x is not None:
            grad_shared = sum_rows(grad_pre.flatten(0, 1), rows.x.order, rows.x.ptr)
            torch.mm(grad_shared, weight, out=grad_x)
            _add_product(grad_weight, grad_shared.t(), x)
        if rows.near is not None:
            grad_near = sum_rows(grad_near, rows.near.order, rows.near.ptr)
        grad_far = sum_rows(grad_pre.flatten(1), rows.far.order, rows.far.ptr).view_as(far)
        return (
            grad_x,
            grad_weight.to(weight.dtype),
            grad_near,
            grad_far,
            grad_key_w.to(key_w.dtype),
            grad_key_b.to(key_w.dtype),
            grad_value_w.to(value_w.dtype),
            grad_value_b.to(value_w.dtype),
            (grad_slope * inv_std).to(norm_w.dtype),
            grad_norm_b.to(norm_b.dtype),
            None,
            None,
            None,
        )


def _counted(edges, rows):
    """Those of a chunk's edges that the statistics are taken over."""
    return slice(max(rows.num_counted - edges.start, 0))


def _take(x, segments, edges):
    """Rows of x that belong to some edges."""
    return x[edges] if segments is None else x.index_select(0, segments.index[edges])


def _queries(near, rows, edges, scale, wide):
    """Scaled queries of some edges, [e, 1, C]."""
    channels = near.shape[1] // 3
    queries = _take(near[:, :channels], rows.near, edges)
    return queries.to(wide).mul(scale)[:, None]


def _centred(keys, query, edges, mean):
    """Products of queries and keys about their mean, [e, M, C]."""
    return (keys[edges].to(query.dtype) * query).sub_(mean)


def _add_product(total, a, b):
    """Add a @ b to a total that may be of a wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
