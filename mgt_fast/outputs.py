"""What goes into a forward pass beside the graph, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .layers import GraphIndex


@dataclass(frozen=True)
class EdgeNoise:
    """Noise that the denoising task adds to the edges; each view sees its own.

    Attributes:
        cosine: added to the SE(3) view's angle cosines, (E, 3).
        vector: added to the SO(3) view's edge vectors, (E, 3), Å.
    """

    cosine: torch.Tensor
    vector: torch.Tensor


@dataclass(frozen=True)
class MGTOutput:
    """Everything a forward pass computes; what the configuration leaves out is None.

    Attributes:
        prediction: (B, output_dim), in the units the network was trained in (scaled targets).
        contributions: share of the SE(3) and SO(3) view in each prediction, (B, 2), rows sum to 1.
        se3_pool, so3_pool: crystal embeddings of the two encoders, (B, C).
        se3_proj, so3_proj: the same after the projection heads, (B, C).
        se3_noise: predicted cosine noise, (B, 3) or, per edge, (E, 3).
        so3_noise: predicted edge-vector noise, (B, 3) or, per edge, (E, 3), Å.
        index: which rows of the graph belong together, for losses that average over them (pretraining).
    """

    prediction: torch.Tensor | None = None
    contributions: torch.Tensor | None = None
    se3_pool: torch.Tensor | None = None
    so3_pool: torch.Tensor | None = None
    se3_proj: torch.Tensor | None = None
    so3_proj: torch.Tensor | None = None
    se3_noise: torch.Tensor | None = None
    so3_noise: torch.Tensor | None = None
    index: GraphIndex | None = field(default=None, repr=False, compare=False)
