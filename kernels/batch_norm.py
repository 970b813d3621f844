"""BatchNorm of rows of which the last ones may be padding."""

from __future__ import annotations

import torch
from torch import nn

from .precision import accumulator_dtype


def batch_norm(y: torch.Tensor, norm: nn.BatchNorm1d, count: torch.Tensor | None = None) -> torch.Tensor:
    """`norm(y)`, (R, C), with the statistics of the first `count` rows.

    Args:
        y: rows to normalise, (R, C).
        norm: in training its running statistics are updated.
        count: number of rows that the statistics are taken over, 0-dim int64 on the device, where it is read.
            The others are padding: what they give has no meaning, and its gradient must be zero. Absent, all
            rows count.
    """
    if count is None or not norm.training:
        return norm(y)
    rows = y.to(accumulator_dtype(y.dtype))
    real = (torch.arange(y.shape[0], device=y.device) < count)[:, None]
    total = count.to(rows.dtype)
    mean = rows.where(real, 0).sum(0) / total
    centred = rows - mean
    square = centred.where(real, 0).square().sum(0)
    norm.num_batches_tracked += 1
    update_running(norm, mean, square / (total - 1))
    slope = norm.weight * (square / total + norm.eps).rsqrt()
    return torch.addcmul(norm.bias, centred, slope).to(y.dtype)


@torch.no_grad()
def update_running(norm: nn.BatchNorm1d, mean: torch.Tensor, unbiased_var: torch.Tensor):
    """Move the running statistics towards those of a batch."""
    for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased_var)):
        running.lerp_(batch.to(running.dtype), norm.momentum)
