"""Plain PyTorch geometry of edges and lattice frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..segments import Segments, gather_rows


def inverse_length(vec: torch.Tensor) -> torch.Tensor:
    """−0.75 / |v|, the scalar that both encoders expand.

    Args:
        vec: (..., 3), Å.

    Returns:
        (...), −0.75 / Å.
    """
    return -0.75 / torch.linalg.vector_norm(vec, dim=-1)


def invariant_geometry(
    edge_vec: torch.Tensor,
    frame: torch.Tensor,
    crystal: Segments,
    cosine_noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scalars of each edge that rotations leave alone, the input of the SE(3) encoder.

    Args:
        edge_vec: r_e, (E, 3), Å.
        frame: the lattice frame L_1..3 as rows, (B, 3, 3), Å.
        crystal: crystal of each edge.
        cosine_noise: added to the cosines, after they are clamped to [−1, 1]; (E, 3) or None.

    Returns:
        −0.75 / |r_e|, (E,), and the cosines of the angles between r_e and L_m, (E, 3).

    Source:
        arXiv 2507.15303, edge and angle features.
    """
    unit_frame = gather_rows(F.normalize(frame, dim=2).flatten(1), crystal).view(-1, 3, 3)
    cosines = (F.normalize(edge_vec, dim=1)[:, None] * unit_frame).sum(-1).clamp(-1, 1)
    return inverse_length(edge_vec), cosines if cosine_noise is None else cosines + cosine_noise
