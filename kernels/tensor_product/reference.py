"""Plain PyTorch tensor products: no per-edge weights, the work is done per atom.

The weights of edge e are W h_e + b with h_e its K hidden channels, so a product is bilinear in (h_e, u_n).
With h_e extended by a channel equal to 1, which carries b, the sum over an atom's edges is taken first.
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


def _with_bias_channel(hidden: torch.Tensor) -> torch.Tensor:
    return F.pad(hidden, (0, 1), value=1.0)


def _contract(outer: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """out[n, w] = Σ_uk outer[n, u, k] weight[u, w, k]."""
    return outer.flatten(1) @ weight.transpose(1, 2).flatten(0, 1)


def _inverse_count(segments: Segments, like: torch.Tensor) -> torch.Tensor:
    return segments.count.clamp(min=1).to(like.dtype).reciprocal()[:, None]


def tensor_product_1(
    node: torch.Tensor,
    hidden: torch.Tensor,
    harmonics: tuple[torch.Tensor, torch.Tensor],
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
        harmonics: Y_1 (E, 3) and Y_2 (E, 5).
        weight, bias: last layer of the weight network, (weight_rows, K) and (weight_rows,), e3nn's path order.
        shape: the multiplicities.
        receiver: atom that takes the mean (row 0 of edge_index).
        sender: atom whose scalars are read (row 1).

    Returns:
        (N, ns), (N, nv, 3), (N, nv, 5); an atom without edges gets zeros.

    Source:
        e3nn FullyConnectedTensorProduct, paths 0⊗0→0, 0⊗1→1, 0⊗2→2.
    """
    ns, nv = shape.num_scalars, shape.num_vectors
    hidden = _with_bias_channel(hidden)
    weight = torch.cat((weight, bias[:, None]), dim=1) * ns**-0.5
    scalar_w, first_w, second_w = weight.split((ns * ns, ns * nv, ns * nv))

    outer = segment_outer(gather_rows(node, sender), hidden, receiver)  # [N, ns, K + 1]
    scalars = _contract(outer, scalar_w.view(ns, ns, -1))

    vector_w = torch.cat((first_w.view(ns, nv, -1), second_w.view(ns, nv, -1)), dim=1)  # [ns, 2nv, K + 1]
    per_atom = (node @ vector_w.transpose(1, 2).flatten(1)).view(node.shape[0], -1, 2 * nv)  # [N, K + 1, 2nv]
    first, second = segment_apply(hidden, per_atom, sender).split(nv, dim=1)  # [E, nv] each
    vectors = torch.cat(
        (
            (first[:, :, None] * harmonics[0][:, None, :]).flatten(1),
            (second[:, :, None] * harmonics[1][:, None, :]).flatten(1),
        ),
        dim=1,
    )
    scale = _inverse_count(receiver, node)
    first, second = (segment_sum(vectors, receiver) * scale).split((3 * nv, 5 * nv), dim=1)
    return scalars * scale, first.unflatten(1, (nv, 3)), second.unflatten(1, (nv, 5))


def tensor_product_2(
    node: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    harmonics: tuple[torch.Tensor, torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    shape: TensorProductShape,
    receiver: Segments,
    sender: Segments,
) -> torch.Tensor:
    """Mean over an atom's edges of TP2: (0, 1, 2) ⊗ (0, 1, 2) → scalars.

    Args:
        node: scalars, l = 1 and l = 2 features, (N, ns), (N, nv, 3), (N, nv, 5).
        hidden, harmonics, weight, bias, shape, receiver, sender: as in `tensor_product_1`.

    Returns:
        (N, ns); an atom without edges gets zeros.

    Source:
        e3nn FullyConnectedTensorProduct, paths 0⊗0→0, 1⊗1→0, 2⊗2→0.
    """
    ns, nv = shape.num_scalars, shape.num_vectors
    scalars, first, second = (gather_rows(part.flatten(1), sender) for part in node)
    invariants = torch.cat(
        (
            scalars,
            (first.unflatten(1, (nv, 3)) * harmonics[0][:, None, :]).sum(-1) * 3**-0.5,
            (second.unflatten(1, (nv, 5)) * harmonics[1][:, None, :]).sum(-1) * 5**-0.5,
        ),
        dim=1,
    )  # [E, ns + 2nv]
    weight = torch.cat((weight, bias[:, None]), dim=1) * (ns + 2 * nv) ** -0.5
    outer = segment_outer(invariants, _with_bias_channel(hidden), receiver)  # [N, ns + 2nv, K + 1]
    return _contract(outer, weight.view(ns + 2 * nv, ns, -1)) * _inverse_count(receiver, hidden)
