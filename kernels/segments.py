"""Rows that belong together: gathers, sums and small outer products over the edges of an atom.

A graph operation on E edges needs only which atom (or crystal) each edge belongs to. `Segments` holds that
once per graph; the two pairs of functions below are each other's gradients:

    gather_rows    y[e] = x[index[e]]               segment_sum    x[i] = sum of y[e] over the rows e of i
    segment_apply  t[e] = h[e] @ z[index[e]]        segment_outer  z[i] = sum of h[e] (outer) t[e]

All of them are deterministic: no atomics, rows are summed in a fixed order. `backend` says what computes the
sums, "torch" or "triton"; a gather is a copy that torch makes as fast as anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.autograd.function import once_differentiable

from .precision import accumulator_dtype, compute_dtype
from .segment_sum import sum_rows


class Segments:
    """Assignment of E rows to n segments.

    Args:
        index: segment of each row, (E,) int64.
        num_segments: n; segments may be empty.
        ptr: first row of each segment and E at the end, (n + 1,) int64, if the rows are sorted by segment;
            otherwise absent, and an order is computed.
    """

    def __init__(self, index: torch.Tensor, num_segments: int, ptr: torch.Tensor | None = None):
        self.index = index
        self.num_segments = num_segments
        self._ptr = ptr

    @cached_property
    def _sorted(self) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.index.device
        if self._ptr is not None:
            return torch.arange(self.index.shape[0], device=device), self._ptr
        ordered, order = self.index.sort(stable=True)
        return order, torch.searchsorted(ordered, torch.arange(self.num_segments + 1, device=device))

    @property
    def order(self) -> torch.Tensor:
        """Rows, segment after segment, (E,) int64."""
        return self._sorted[0]

    @property
    def ptr(self) -> torch.Tensor:
        """Where each segment starts in `order`, and E at the end, (n + 1,) int64."""
        return self._sorted[1]

    @cached_property
    def count(self) -> torch.Tensor:
        """Rows of each segment, (n,) int64."""
        return self.ptr.diff()

    @cached_property
    def groups(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Segments of equal size side by side, as (segments (g,), their rows (g, size)) for each size > 0."""
        groups = []
        for size in self.count.unique().tolist():
            if size:
                segments = torch.nonzero(self.count == size).flatten()
                rows = self.ptr[segments, None] + torch.arange(size, device=self.ptr.device)
                groups.append((segments, self.order[rows]))
        return groups


@dataclass(frozen=True)
class SharedRows:
    """Features of E rows, of which equal ones are there once.

    Attributes:
        values: (n, D).
        rows: which of them each of the E rows has; None if every row has its own.
    """

    values: torch.Tensor
    rows: Segments | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> SharedRows:
        """Apply a function that treats every row alike."""
        return SharedRows(function(self.values), self.rows)

    def expand(self) -> torch.Tensor:
        """Give every row its features, (E, D)."""
        return self.values if self.rows is None else gather_rows(self.values, self.rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, segments, backend):
        ctx.segments, ctx.backend = segments, backend
        return x.index_select(0, segments.index)

    @staticmethod
    def backward(ctx, grad):
        return _SegmentSum.apply(grad, ctx.segments, ctx.backend), None, None


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, segments, backend):
        ctx.segments, ctx.backend = segments, backend
        return sum_rows(y, segments.order, segments.ptr, backend=backend)

    @staticmethod
    def backward(ctx, grad):
        return _GatherRows.apply(grad, ctx.segments, ctx.backend), None, None


def gather_rows(x: torch.Tensor, segments: Segments, *, backend: str = "torch") -> torch.Tensor:
    """Give each row the value of its segment, (n, D) → (E, D)."""
    return _GatherRows.apply(x, segments, backend)


def segment_sum(y: torch.Tensor, segments: Segments, *, backend: str = "torch") -> torch.Tensor:
    """Sum the rows of each segment, (E, D) → (n, D); an empty segment gives zeros."""
    return _SegmentSum.apply(y, segments, backend)


def segment_mean(y: torch.Tensor, segments: Segments, *, backend: str = "torch") -> torch.Tensor:
    """Average the rows of each segment in float32 or better, (E, D) → (n, D); an empty one gives zeros."""
    y = y.to(accumulator_dtype(y.dtype))
    return segment_sum(y, segments, backend=backend) / segments.count.clamp(min=1).to(y.dtype)[:, None]


def _outer(h, t, segments):
    z = h.new_empty(segments.num_segments, h.shape[1], t.shape[1])
    z[torch.nonzero(segments.count == 0).flatten()] = 0  # a mask would walk over all of z
    for members, rows in segments.groups:
        z[members] = torch.bmm(h[rows].transpose(1, 2), t[rows])
    return z


def _apply(h, z, segments):
    t = h.new_empty(h.shape[0], z.shape[2])
    for members, rows in segments.groups:
        t[rows] = torch.bmm(h[rows], z[members])
    return t


class _SegmentOuter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, t, segments):
        ctx.save_for_backward(h, t)
        ctx.segments = segments
        return _outer(h, t, segments)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, t = ctx.saved_tensors
        grad_h = _apply(t, grad.transpose(1, 2), ctx.segments)
        return grad_h, _apply(h, grad, ctx.segments), None


class _SegmentApply(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, z, segments):
        ctx.save_for_backward(h, z)
        ctx.segments = segments
        return _apply(h, z, segments)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, z = ctx.saved_tensors
        grad_h = _apply(grad, z.transpose(1, 2), ctx.segments)
        return grad_h, _outer(h, grad, ctx.segments), None


def segment_outer(h: torch.Tensor, t: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Sum the outer products h[e] t[e]ᵀ of each segment's rows, (E, K), (E, U) → (n, K, U)."""
    dtype = compute_dtype(h)
    return _SegmentOuter.apply(h.to(dtype), t.to(dtype), segments)


def segment_apply(h: torch.Tensor, z: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Multiply each row by its segment's matrix, (E, K), (n, K, U) → (E, U)."""
    dtype = compute_dtype(h)
    return _SegmentApply.apply(h.to(dtype), z.to(dtype), segments)
