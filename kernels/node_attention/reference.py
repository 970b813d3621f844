"""Plain PyTorch `node_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..gated_sum import gated_sum
from ..segments import Segments, gather_rows, segment_sum


def node_attention(
    node: torch.Tensor,
    edge: torch.Tensor,
    source: Segments,
    target: Segments,
    node_w: torch.Tensor,
    query_b: torch.Tensor,
    edge_w: torch.Tensor,
    edge_b: torch.Tensor,
    key: nn.Linear,
    value: nn.Linear,
    norm: nn.BatchNorm1d,
) -> torch.Tensor:
    """Sum over the edges j → i of the gated values, before the output projection.

    Args:
        node: atom features x, (N, C).
        edge: edge features f, (E, C).
        source: atom j of each edge (row 0 of edge_index).
        target: atom i of each edge (row 1), which receives the sum.
        node_w: merged map of x to query, target part (key, value) and source part (key, value), (5C, C).
        query_b: bias of the query, (C,).
        edge_w, edge_b: merged map of f to key and value part, (2C, C), with every other bias, (2C,).
        key, value, norm: second layers and BatchNorm, see `gated_sum`.

    Returns:
        (N, C).
    """
    channels = node.shape[1]
    from_node = F.linear(node, node_w)  # [N, 5C]
    query, as_target, as_source = from_node.split((channels, 2 * channels, 2 * channels), dim=1)
    pre = F.linear(edge, edge_w, edge_b)  # [E, 2C]
    pre += gather_rows(as_target, target)
    pre += gather_rows(as_source, source)
    messages = gated_sum(pre[:, None], gather_rows(query + query_b, target), key, value, norm)
    return segment_sum(messages, target)
