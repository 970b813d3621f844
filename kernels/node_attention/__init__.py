"""The node-wise attention of both encoders: every atom attends to its edges."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..batch_norm import BatchNorm
from ..gated_attention import gated_attention
from ..segments import Segments, segment_sum

__all__ = ["node_attention"]


def node_attention(
    node: torch.Tensor,
    edge: torch.Tensor,
    source: Segments,
    target: Segments,
    target_w: torch.Tensor,
    target_b: torch.Tensor,
    source_w: torch.Tensor,
    edge_w: torch.Tensor,
    key: nn.Linear,
    value: nn.Linear,
    norm: BatchNorm,
    *,
    edge_rows: Segments | None = None,
    count: torch.Tensor | None = None,
    backend: str = "torch",
) -> torch.Tensor:
    """Sum over the edges j → i of the gated values, before the output projection.

    Args:
        node: atom features x, (N, C).
        edge: edge features f, (E, C).
        source: atom j of each edge (row 0 of edge_index).
        target: atom i of each edge (row 1), which receives the sum.
        target_w, target_b: merged map of x_i to query, key and value part, (3C, C), and every bias, (3C,).
        source_w: merged map of x_j to key and value part, (2C, C).
        edge_w: merged map of f to key and value part, (2C, C).
        edge_rows: where edges share their features, which of f (n, C) each has.
        key, value, norm, count, backend: second layers and BatchNorm, see `gated_attention`.

    Returns:
        (N, C).
    """
    as_target = F.linear(node, target_w, target_b)  # [N, 3C]
    as_source = F.linear(node, source_w)  # [N, 2C]
    messages = gated_attention(
        edge if edge_rows else edge[:, None], edge_w, as_target, target, as_source[:, None], source,
        key, value, norm, x_rows=edge_rows, count=count, backend=backend,
    )  # fmt: skip
    return segment_sum(messages, target, backend=backend)
