"""Plain PyTorch `gated_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..segments import Segments, gather_rows
from .gated_sum import gated_sum


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
) -> torch.Tensor:
    """Sum over an edge's M keys of v_m · sigmoid(BN(q · k_m / √C)); see the public function."""
    channels = x.shape[2]
    query, first_layer = near.split((channels, 2 * channels), dim=1)
    if near_rows is not None:
        query, first_layer = gather_rows(query, near_rows), gather_rows(first_layer, near_rows)
    pre = F.linear(x, weight)  # [E, M, 2C]
    pre += first_layer[:, None]
    pre += gather_rows(far.flatten(1), far_rows).view_as(pre)
    return gated_sum(pre, query, key, value, norm)
