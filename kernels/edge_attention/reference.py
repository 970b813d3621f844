"""Plain PyTorch `edge_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..gated_sum import gated_sum
from ..segments import Segments, gather_rows


def edge_attention(
    edge: torch.Tensor,
    angle: torch.Tensor,
    frame: torch.Tensor,
    crystal: Segments,
    edge_w: torch.Tensor,
    query_b: torch.Tensor,
    angle_w: torch.Tensor,
    key: nn.Linear,
    value: nn.Linear,
    norm: nn.BatchNorm1d,
) -> torch.Tensor:
    """Sum over the three lattice directions of the gated values, before the output projection.

    Args:
        edge: edge features f, (E, C).
        angle: angle embeddings a, (E, 3, C).
        frame: what each direction adds to the first layers of key and value, (B, 3, 2C).
        crystal: crystal of each edge.
        edge_w: merged map of f to query, key and value part, (3C, C).
        query_b: bias of the query, (C,).
        angle_w: merged map of a to key and value part, (2C, C).
        key, value, norm: second layers and BatchNorm, see `gated_sum`.

    Returns:
        (E, C).
    """
    channels = edge.shape[1]
    from_edge = F.linear(edge, edge_w)  # [E, 3C]
    query = from_edge[:, :channels] + query_b
    pre = F.linear(angle, angle_w)  # [E, 3, 2C]
    pre += from_edge[:, None, channels:]
    pre += gather_rows(frame.flatten(1), crystal).view_as(pre)
    return gated_sum(pre, query, key, value, norm)
