"""The operations of `mgt_fast.kernels` as one would first write them in PyTorch, autograd and all.

They take the arguments of the fast ones and are their rivals on a CPU, as e3nn is for the tensor products:
dense bases, every row gathered, index_add for sums, torch's own modules.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = {None: lambda x: x, "softplus": F.softplus, "silu": F.silu}


def rbf_embedding(x, weight, bias, centers, spacing, activation=None):
    """Activation(Linear(RBF(x))), (R,) → (R, C)."""
    basis = torch.exp(-(((x[:, None] - centers) / spacing) ** 2))
    return ACTIVATIONS[activation](F.linear(basis, weight, bias))


def residual_norm(x, y, norm):
    """softplus(x + BatchNorm(y)), (R, C)."""
    return F.softplus(x + norm(y))


def segment_sum(y, segments):
    """Sum the rows of each segment, (E, D) → (n, D)."""
    return y.new_zeros(segments.num_segments, y.shape[1]).index_add(0, segments.index, y)


def edge_attention(edge, angle, frame, crystal, edge_w, edge_b, angle_w, key, value, norm):
    """Σ over the three lattice directions of v_m σ(BN(q · k_m / √C)), (E, C)."""
    query, first = F.linear(edge, edge_w, edge_b).split((edge.shape[1], 2 * edge.shape[1]), dim=1)
    first = first[:, None] + frame[crystal.index] + F.linear(angle, angle_w)  # [E, 3, 2C]
    return gated(query[:, None], first, key, value, norm).sum(dim=1)


def node_attention(
    node, edge, source, target, target_w, target_b, source_w, edge_w, key, value, norm
):  # fmt: skip
    """Σ over the edges j → i of v σ(BN(q · k / √C)), (N, C)."""
    query, first = F.linear(node, target_w, target_b)[target.index].split(
        (node.shape[1], 2 * node.shape[1]), dim=1
    )
    first = first + F.linear(node, source_w)[source.index] + F.linear(edge, edge_w)  # [E, 2C]
    return segment_sum(gated(query, first, key, value, norm), target)


def gated(query, first, key, value, norm):
    """V σ(BN(q · k / √C)) from the sums of the first layers, (..., 2C) → (..., C)."""
    hidden_key, hidden_value = F.silu(first).chunk(2, dim=-1)
    product = query * key(hidden_key) / query.shape[-1] ** 0.5
    gate = torch.sigmoid(norm(product.flatten(0, -2))).view_as(product)
    return value(hidden_value) * gate
