"""BatchNorm of rows that may be padding, a share of a batch over many processes, or computed a second time.

Every BatchNorm of the network goes through the same three steps, whatever computes them:

    moments = norm.known(dtype)                       # running statistics, or those of the first computation
    if moments is None:
        moments = norm.settle(moments of own rows)    # joined with those of other rows, if there are such
    ...                                               # normalise by moments.mean and moments.var
    sums = norm.total(sums over own rows)             # backward: Σ g and Σ g · ŷ, joined in the same way
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .precision import accumulator_dtype


class Moments(NamedTuple):
    """What some rows (R, C) are normalised by.

    Attributes:
        count: R, or 0-dim on the device where reading it would wait.
        mean: (C,); zeros for no rows.
        var: mean squared distance from the mean, (C,); zeros for no rows.
    """

    count: int | torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor


class Statistics(Protocol):
    """How a batch of which a norm sees only some rows at once is normalised as a whole."""

    def forward(self, norm: BatchNorm, own: Moments) -> Moments:
        """Return the moments of all rows from those of own rows, and have the running statistics move."""

    def backward(self, norm: BatchNorm, sums: torch.Tensor) -> torch.Tensor:
        """Return sums over all rows from those over own rows, (2, C)."""


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over rows (R, C); parameters, buffers and momentum are those of `nn.BatchNorm1d`.

    Attributes:
        statistics: how the batch's statistics are made; None: of own rows alone.
        tape: what the layer remembers while it is computed for the first or the second time; see `Tape`.
    """

    statistics: Statistics | None = None
    tape: Tape | None = None

    def known(self, dtype: torch.dtype) -> Moments | None:
        """Moments that are known before the rows are: outside training, or in a second computation."""
        if not self.training:
            return Moments(0, self.running_mean.to(dtype), self.running_var.to(dtype))
        return self.tape.moments[self] if self.replays else None

    @property
    def replays(self) -> bool:
        """Whether this is a second computation in training, which must not move running statistics again."""
        return self.training and self.tape is not None and self.tape.replays

    @torch.no_grad()
    def settle(self, own: Moments) -> Moments:
        """Return the moments to normalise by in training; the running statistics move towards them."""
        if self.statistics is None:
            moments = own
            self.move(own)
        else:
            moments = self.statistics.forward(self, own)
        if self.tape is not None:
            self.tape.moments[self] = moments
        return moments

    def total(self, sums: torch.Tensor) -> torch.Tensor:
        """Sum over all rows that `settle` took the moments of, from the sums over own rows, (2, C)."""
        return sums if self.statistics is None else self.statistics.backward(self, sums)

    @torch.no_grad()
    def move(self, batch: Moments):
        """Move the running statistics towards those of a batch."""
        count = batch.count.to(batch.var.dtype) if isinstance(batch.count, torch.Tensor) else batch.count
        unbiased = batch.var * (count / (count - 1))
        for running, new in ((self.running_mean, batch.mean), (self.running_var, unbiased)):
            running.lerp_(new.to(running.dtype), self.momentum)
        self.num_batches_tracked += 1

    def require_rows(self, count: int):
        """Raise ValueError in training with fewer than two rows; others' rows are not known here."""
        if self.training and self.statistics is None and count < 2:
            raise ValueError(f"batch statistics need at least 2 rows, got {count}")


class Tape:
    """The moments that a layer's norms found, for when the layer is computed again in the backward pass.

    Args:
        layer: computed once within `recording`, and then, any number of times, within `replaying`.
    """

    def __init__(self, layer: nn.Module):
        self.norms = [module for module in layer.modules() if isinstance(module, BatchNorm)]
        self.moments: dict[BatchNorm, Moments] = {}
        self.replays = False
        self.recording, self.replaying = _Running(self, replays=False), _Running(self, replays=True)


@dataclass(frozen=True)
class _Running:
    """Context in which norms write on a tape, or read from it; it may be entered again."""

    tape: Tape
    replays: bool

    def __enter__(self):
        self.tape.replays = self.replays
        for norm in self.tape.norms:
            norm.tape = self.tape

    def __exit__(self, *_):
        for norm in self.tape.norms:
            norm.tape = None


def batch_norm(y: torch.Tensor, norm: BatchNorm, count: torch.Tensor | None = None) -> torch.Tensor:
    """`norm(y)`, (R, C), with the statistics of the first `count` rows, joined as `norm.statistics` says.

    Args:
        y: rows to normalise, (R, C).
        norm: in training its running statistics are updated.
        count: number of rows that the statistics are taken over, 0-dim int64 on the device, where it is read.
            The others are padding: what they give has no meaning, and its gradient must be zero. Absent, all
            rows count.
    """
    if norm.training and (count is not None or norm.statistics is not None):
        return _BatchNorm.apply(y, norm.weight, norm.bias, count, norm)
    if norm.replays:  # the same kernel finds the same moments; only copies of the running statistics move
        running = norm.running_mean.clone(), norm.running_var.clone()
        return F.batch_norm(y, *running, norm.weight, norm.bias, True, norm.momentum, norm.eps)
    return norm(y)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, weight, bias, count, norm):
        rows = y.to(accumulator_dtype(y.dtype))
        moments = norm.known(rows.dtype)
        if moments is None:
            moments = norm.settle(_moments(rows, count))
        inv_std = (moments.var + norm.eps).rsqrt()
        ctx.save_for_backward(y, weight, moments.mean, inv_std, count)
        ctx.norm, ctx.total = norm, moments.count
        return torch.addcmul(bias, rows - moments.mean, weight * inv_std).to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, weight, mean, inv_std, count = ctx.saved_tensors
        grad = grad.to(mean.dtype)
        standard = (y.to(mean.dtype) - mean).mul_(inv_std)
        sums = torch.stack((grad.sum(0), (grad * standard).sum(0)))
        shift, slope = ctx.norm.total(sums) / ctx.total
        grad_y = (grad - shift).sub_(standard.mul_(slope)).mul_(weight * inv_std)
        if count is not None:
            grad_y = grad_y.where(_counted(y, count), 0)
        return grad_y.to(y.dtype), sums[1], sums[0], None, None


def _counted(y: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Which rows count, (R, 1)."""
    return (torch.arange(y.shape[0], device=y.device) < count)[:, None]


def _moments(rows: torch.Tensor, count: torch.Tensor | None) -> Moments:
    """Moments of the rows that count."""
    if count is None:
        mean = rows.sum(0) / max(rows.shape[0], 1)
        square = (rows - mean).square_().sum(0)
        return Moments(rows.shape[0], mean, square / max(rows.shape[0], 1))
    real, total = _counted(rows, count), count.clamp(min=1).to(rows.dtype)
    mean = rows.where(real, 0).sum(0) / total
    square = (rows - mean).where(real, 0).square_().sum(0)
    return Moments(count, mean, square / total)
