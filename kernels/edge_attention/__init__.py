"""The SE(3) encoder's edge-wise attention: every edge attends to the three lattice directions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..batch_norm import BatchNorm
from ..gated_attention import gated_attention
from ..segments import Segments

__all__ = ["edge_attention"]


def edge_attention(
    edge: torch.Tensor,
    angle: torch.Tensor,
    frame: torch.Tensor,
    crystal: Segments,
    edge_w: torch.Tensor,
    edge_b: torch.Tensor,
    angle_w: torch.Tensor,
    key: nn.Linear,
    value: nn.Linear,
    norm: BatchNorm,
    *,
    edge_rows: Segments | None = None,
    angle_rows: Segments | None = None,
    count: torch.Tensor | None = None,
    backend: str = "torch",
) -> torch.Tensor:
    """Sum over the three lattice directions of the gated values, before the output projection.

    Args:
        edge: edge features f, (E, C).
        angle: angle embeddings a, (E, 3, C).
        frame: what each direction adds to the first layers of key and value, (B, 3, 2C).
        crystal: crystal of each edge.
        edge_w, edge_b: merged map of f to query, key and value part, (3C, C) and (3C,).
        angle_w: merged map of a to key and value part, (2C, C).
        edge_rows: where edges share their features, which of f (n, C) each has.
        angle_rows: where directions share their embeddings, which of a (n, C) each of E·3 has.
        key, value, norm, count, backend: second layers and BatchNorm, see `gated_attention`.

    Returns:
        (E, C).
    """
    from_edge = F.linear(edge, edge_w, edge_b)  # [E, 3C]
    return gated_attention(
        angle, angle_w, from_edge, edge_rows, frame, crystal, key, value, norm,
        x_rows=angle_rows, count=count, backend=backend,
    )  # fmt: skip
