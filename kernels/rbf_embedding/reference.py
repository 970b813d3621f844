"""Plain PyTorch `rbf_embedding`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..activations import softplus

# A Gaussian six spacings from its centre is exp(-36) = 2e-16 of its height: below float64's resolution.
REACH = 6

ACTIVATIONS = {None: lambda x: x, "softplus": softplus, "silu": F.silu}


def rbf_embedding(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    centers: torch.Tensor,
    spacing: float,
    activation: str | None = None,
) -> torch.Tensor:
    """Activation(Linear(RBF(x))) with RBF_c(x) = exp(−((x − c) / spacing)²), without the (R, K) basis.

    Args:
        x: values, (R,); beyond the outermost centres the basis decays to zero.
        weight: (C, K), one column a centre.
        bias: (C,).
        centers: evenly spaced centres in ascending order, (K,).
        spacing: width of the Gaussians, the distance of two centres.
        activation: "softplus", "silu" or None.

    Returns:
        (R, C); differentiable in x, weight and bias.

    Source:
        arXiv 2507.15303, edge and angle embeddings; the local support is identity 4 of the merged algebra.
    """
    num_centers = centers.shape[0]
    width = min(2 * REACH + 1, num_centers)
    nearest = torch.round((x.detach() - centers[0]) / spacing).long()
    first = (nearest - width // 2).clamp(0, num_centers - width)
    window = first[:, None] + torch.arange(width, device=x.device)  # [R, width]
    basis = torch.exp(-(((x[:, None] - centers[window]) / spacing) ** 2))
    out = F.embedding_bag(window, weight.t().contiguous(), per_sample_weights=basis, mode="sum") + bias
    return ACTIVATIONS[activation](out)
