"""Plain PyTorch `sum_rows`."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sum_rows(y: torch.Tensor, order: torch.Tensor, ptr: torch.Tensor) -> torch.Tensor:
    """Sum y[order[k]] over ptr[i] <= k < ptr[i + 1].

    Args:
        y: (E, D).
        order: rows of y, segment after segment, (E,) int64.
        ptr: where each segment starts in `order`, and E at the end, (n + 1,) int64.

    Returns:
        (n, D); an empty segment gives zeros.
    """
    return F.embedding_bag(order, y.contiguous(), ptr, mode="sum", include_last_offset=True)
