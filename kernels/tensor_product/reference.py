"""Plain PyTorch tensor products: no per-edge weights, the work is done per atom.

The weights of edge e are W h_e + b with h_e its K hidden channels, so a product is bilinear in (h_e, u_n):
the sum over an atom's edges is taken first, of h_e ⊗ u_n for W and of u_n for b.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..segments import Segments, gather_rows, segment_apply, segment_outer, segment_sum


@dataclass(frozen=True)
class TensorProductShape:
    """Multiplicities of the irreps: ns × 0e, nv × 1o, nv × 2e."""

    num_scalars: int
    num_vectors: int

    @property
    def weight_rows(self) -> int:
        """Weights an edge, the same number for both products."""
        return self.num_scalars**2 + 2 * self.num_scalars * self.num_vectors


def spherical_harmonics(unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Real spherical harmonics l = 1 and l = 2 of unit vectors, "component" normalised, e3nn's order.

    Args:
        unit: (E, 3).

    Returns:
        (E, 3) and (E, 5); the squares of each add up to 3 and 5.
    """
    x, y, z = unit.unbind(1)
    r3, r5, r15 = 3**0.5, 5**0.5, 15**0.5
    second = (
        r15 * x * z,
        r15 * x * y,
        r5 * (y * y - (x * x + z * z) / 2),
        r15 * y * z,
        r15 / 2 * (z * z - x * x),
    )
    return r3 * unit, torch.stack(second, dim=1)


def _sum_of_products(
    features: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    receiver: Segments,
) -> torch.Tensor:
    """Σ_e over a receiver's edges of features_e (W h_e + b), (E, U), (E, K), (U·ns, K), (U·ns,) → (N, ns)."""
    size = features.shape[1]
    weight = weight.view(size, -1, hidden.shape[1]).transpose(1, 2).flatten(0, 1)  # [U·K, ns]
    outer = segment_outer(features, hidden, receiver)  # [N, U, K]
    return outer.flatten(1) @ weight + segment_sum(features, receiver) @ bias.view(size, -1)


def _inverse_count(segments: Segments, like: torch.Tensor) -> torch.Tensor:
    return segments.count.clamp(min=1).to(like.dtype).reciprocal()[:, None]


def tensor_product_1(
    node: torch.Tensor,
    hidden: torch.Tensor,
    edge_vec: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shape: TensorProductShape,
    receiver: Segments,
    sender: Segments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean over an atom's edges of TP1: scalars ⊗ (1, Y_1, Y_2) → scalars, l = 1 and l = 2 features.

    Args:
        node: scalars u, (N, ns).
        hidden: hidden channels h of the weight network, (E, K).
        edge_vec: vectors of the edges, (E, 3); their lengths do not matter.
        weight, bias: last layer of the weight network, (weight_rows, K) and (weight_rows,),
            in e3nn's order of paths.
        shape: the multiplicities.
        receiver: atom that takes the mean (row 0 of edge_index).
        sender: atom whose scalars are read (row 1).

    Returns:
        (N, ns), (N, nv, 3), (N, nv, 5); an atom without edges gets zeros.

    Source:
        e3nn FullyConnectedTensorProduct, paths 0⊗0→0, 0⊗1→1, 0⊗2→2.
    """
    ns, nv = shape.num_scalars, shape.num_vectors
    rows = (ns * ns, 2 * ns * nv)
    (scalar_w, vector_w), (scalar_b, vector_b) = weight.split(rows), bias.split(rows)
    scalars = _sum_of_products(gather_rows(node, sender), hidden, scalar_w, scalar_b, receiver)

    harmonics = spherical_harmonics(F.normalize(edge_vec, dim=1))
    # Both vector paths end in a factor Y_l of the edge, so the sender's side is contracted first.
    vector_w = torch.cat(vector_w.view(2, ns, nv, -1).unbind(), dim=1)  # [ns, 2nv, K]
    vector_b = torch.cat(vector_b.view(2, ns, nv).unbind(), dim=1)  # [ns, 2nv]
    per_atom = (node @ vector_w.transpose(1, 2).flatten(1)).unflatten(1, (-1, 2 * nv))  # [N, K, 2nv]
    along = segment_apply(hidden, per_atom, sender) + gather_rows(node @ vector_b, sender)  # [E, 2nv]
    first, second = along.split(nv, dim=1)
    vectors = torch.cat(
        (
            (first[:, :, None] * harmonics[0][:, None, :]).flatten(1),
            (second[:, :, None] * harmonics[1][:, None, :]).flatten(1),
        ),
        dim=1,
    )
    scale = _inverse_count(receiver, node) * ns**-0.5
    first, second = (segment_sum(vectors, receiver) * scale).split((3 * nv, 5 * nv), dim=1)
    return scalars * scale, first.unflatten(1, (nv, 3)), second.unflatten(1, (nv, 5))


def tensor_product_2(
    node: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    edge_vec: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shape: TensorProductShape,
    receiver: Segments,
    sender: Segments,
) -> torch.Tensor:
    """Mean over an atom's edges of TP2: (0, 1, 2) ⊗ (0, 1, 2) → scalars.

    Args:
        node: scalars, l = 1 and l = 2 features, (N, ns), (N, nv, 3), (N, nv, 5).
        hidden, edge_vec, weight, bias, shape, receiver, sender: as in `tensor_product_1`.

    Returns:
        (N, ns); an atom without edges gets zeros.

    Source:
        e3nn FullyConnectedTensorProduct, paths 0⊗0→0, 1⊗1→0, 2⊗2→0.
    """
    ns, nv = shape.num_scalars, shape.num_vectors
    harmonics = spherical_harmonics(F.normalize(edge_vec, dim=1))
    scalars, first, second = (gather_rows(part.flatten(1), sender) for part in node)
    invariants = torch.cat(
        (
            scalars,
            (first.unflatten(1, (nv, 3)) * harmonics[0][:, None, :]).sum(-1) * 3**-0.5,
            (second.unflatten(1, (nv, 5)) * harmonics[1][:, None, :]).sum(-1) * 5**-0.5,
        ),
        dim=1,
    )  # [E, ns + 2nv]
    scale = _inverse_count(receiver, hidden) * (ns + 2 * nv) ** -0.5
    return _sum_of_products(invariants, hidden, weight, bias, receiver) * scale
