"""Plain PyTorch `residual_norm`."""

from __future__ import annotations

import torch

from ..activations import softplus
from ..batch_norm import BatchNorm, batch_norm


def residual_norm(
    x: torch.Tensor, y: torch.Tensor, norm: BatchNorm, count: torch.Tensor | None = None
) -> torch.Tensor:
    """softplus(x + BatchNorm(y)), the end of both attention layers.

    Args:
        x: features to update, (R, C).
        y: their change before normalisation, (R, C).
        norm: BatchNorm over the R rows, and others if it has `statistics`; in training its running
            statistics are updated.
        count: number of rows that the statistics are taken over, the first ones; see `batch_norm`.

    Returns:
        (R, C).

    Raises:
        ValueError: in training with a single row, whose statistics do not exist.

    Source:
        arXiv 2507.15303, edge-wise and node-wise attention.
    """
    return softplus(x + batch_norm(y, norm, count))
