"""The layers of both encoders.

Parameters keep the published names and shapes, so that checkpoints fit; the forward passes merge chains of
linear maps inside (identities 1-3 and 5 of the merged algebra) and hand the arithmetic to `kernels`.
Letters: N atoms, E edges, B crystals, C channels.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .elements import cgcnn_features
from .graph import CrystalGraph
from .kernels.activations import softplus
from .kernels.batch_norm import BatchNorm, Tape, batch_norm
from .kernels.edge_attention import edge_attention
from .kernels.node_attention import node_attention
from .kernels.rbf_embedding import rbf_embedding
from .kernels.residual_norm import residual_norm
from .kernels.segments import Segments, SharedRows
from .kernels.tensor_product import TensorProductShape, tensor_product_1, tensor_product_2


class GraphIndex:
    """Which rows of a graph belong together, made once, at first use; and what computes on them.

    Args:
        graph: the crystals.
        backend: "torch" or "triton".
        recompute: whether layers keep their inputs alone for the backward pass; see `run_layer`.
    """

    def __init__(self, graph: CrystalGraph, backend: str = "torch", recompute: bool = False):
        self.graph = graph
        self.backend = backend
        self.recompute = recompute

    @property
    def num_real_atoms(self) -> torch.Tensor | None:
        """Atoms that statistics are taken over, 0-dim; all of them where it is None."""
        return None if self.graph.num_real is None else self.graph.num_real[1]

    @property
    def num_real_edges(self) -> torch.Tensor | None:
        """Edges that statistics are taken over, 0-dim; all of them where it is None."""
        return None if self.graph.num_real is None else self.graph.num_real[2]

    @cached_property
    def source(self) -> Segments:
        """Atom each edge starts from (row 0)."""
        return Segments(self.graph.edge_index[0], self.graph.num_atoms, self.graph.row_ptr)

    @cached_property
    def target(self) -> Segments:
        """Atom each edge points to (row 1)."""
        # A copy: kernels are compiled for aligned rows, and this one starts where the first ends.
        return Segments(self.graph.edge_index[1].clone(), self.graph.num_atoms)

    @cached_property
    def crystal(self) -> Segments:
        """Crystal of each atom."""
        return Segments(self.graph.batch, self.graph.num_crystals, self.graph.batch_ptr)

    @cached_property
    def crystal_of_edge(self) -> Segments:
        """Crystal of each edge."""
        edge_ptr = self.graph.row_ptr[self.graph.batch_ptr]
        index = self.graph.batch[self.graph.edge_index[0]]
        return Segments(index, self.graph.num_crystals, edge_ptr)


def run_layer(layer: nn.Module, *inputs, index: GraphIndex):
    """Return layer(*inputs, index).

    With `index.recompute` the layer keeps its inputs and its norms' statistics for the backward pass and is
    computed again there: the same gradients, bit for bit where the layer repeats itself, with less memory.
    """
    if not (index.recompute and torch.is_grad_enabled()):
        return layer(*inputs, index)
    tape = Tape(layer)
    return checkpoint(
        layer,
        *inputs,
        index,
        use_reentrant=False,
        preserve_rng_state=False,  # no layer draws
        context_fn=lambda: (tape.recording, tape.replaying),
    )


class AtomEmbedding(nn.Linear):
    """Linear map of the 92-entry CGCNN vector of each element to C channels."""

    def __init__(self, channels: int):
        features = cgcnn_features()
        super().__init__(features.shape[1], channels)
        self.register_buffer("features", features, persistent=False)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        """Embed atomic numbers, (N,) → (N, C)."""
        features = self.features[numbers]
        unknown = features[:, 0].isnan()
        if numbers.device.type != "cpu":  # to read the numbers would wait for the device
            torch._assert_async(~unknown.any(), "an element without CGCNN features; leave its crystal out")
        elif unknown.any():
            named = numbers[unknown].unique().tolist()
            raise ValueError(f"no CGCNN features for atomic numbers {named}; leave these crystals out")
        return super().forward(features)


class RBF(nn.Module):
    """Centres of K evenly spaced Gaussians one spacing wide."""

    def __init__(self, low: float, high: float, num_centers: int):
        super().__init__()
        self.register_buffer("centers", torch.linspace(low, high, num_centers))

    @cached_property
    def spacing(self) -> float:
        """Mean distance of two centres; published checkpoints hold it to float32 precision."""
        return float(np.diff(self.centers.float().cpu().numpy()).mean())


WORTH_SHARING = 0.75
"""Share of distinct values among all below which fewer products outweigh the copies that rows cost."""


class RBFEmbedding(nn.Sequential):
    """Activation(Linear(RBF(x))) of R values."""

    def __init__(self, low: float, high: float, channels: int, activation: str):
        super().__init__(RBF(low, high, channels), nn.Linear(channels, channels))
        self.activation = activation

    def forward(self, x: torch.Tensor, backend: str = "torch") -> SharedRows:
        """Embed x (R,), equal values once: symmetry makes most lengths and angles of a crystal equal.

        Equal values are looked for where that costs little beside the products it saves: on a CPU, where no
        gradient of x is asked for.
        """
        if backend == "torch" and x.device.type == "cpu" and not x.requires_grad:
            distinct, row = x.unique(return_inverse=True)
            if distinct.shape[0] < WORTH_SHARING * x.shape[0]:
                return SharedRows(self._embed(distinct, backend), Segments(row, distinct.shape[0]))
        return SharedRows(self._embed(x, backend))

    def _embed(self, x: torch.Tensor, backend: str) -> torch.Tensor:
        rbf, linear = self
        return rbf_embedding(
            x, linear.weight, linear.bias, rbf.centers, rbf.spacing, self.activation, backend=backend
        )


def _mlp(channels: int) -> nn.Sequential:
    """First and second layer of the key or the value network on three concatenated inputs."""
    return nn.Sequential(nn.Linear(3 * channels, channels), nn.SiLU(), nn.Linear(channels, channels))


class _Attention(nn.Module):
    """Parameters that the edge-wise and the node-wise layer share."""

    def __init__(self, channels: int, edge_bias: bool):
        super().__init__()
        self.lin_query = nn.Linear(channels, channels)
        self.lin_key = nn.Linear(channels, channels)
        self.lin_value = nn.Linear(channels, channels)
        self.lin_edge = nn.Linear(channels, channels, bias=edge_bias)
        self.key_update = _mlp(channels)
        self.lin_msg_update = _mlp(channels)
        self.lin_concate = nn.Linear(channels, channels)
        self.bn_att = BatchNorm(channels)
        self.bn = BatchNorm(channels)


class EdgeWiseAttention(_Attention):
    """Edge-wise layer of the SE(3) encoder: f ← softplus(f + BN(Σ_m Wc v_m σ(BN(q k_m / √C))))."""

    def __init__(self, channels: int):
        super().__init__(channels, edge_bias=False)
        for m in (1, 2, 3):
            self.add_module(f"lin_key_e{m}", nn.Linear(channels, channels))
            self.add_module(f"lin_value_e{m}", nn.Linear(channels, channels))

    def forward(
        self, edge: SharedRows, angle: SharedRows, frame: torch.Tensor, index: GraphIndex
    ) -> torch.Tensor:
        """Update edge features.

        Args:
            edge: f of E edges.
            angle: embeddings of the E·3 angles to the lattice frame.
            frame: embeddings of the frame's lengths, (B, 3, C).
            index: the graph's rows.

        Returns:
            f, (E, C).
        """
        edge_w, edge_b, angle_w = [self.lin_query.weight], [self.lin_query.bias], []
        frame_w, frame_b = ([], [], []), ([], [], [])
        with torch.autocast(frame.device.type, enabled=False):  # merged weights are rounded once
            for name, mlp in (("key", self.key_update), ("value", self.lin_msg_update)):
                of_edge, of_frame, of_angle = mlp[0].weight.chunk(3, dim=1)
                lin_edge = self.get_submodule(f"lin_{name}")
                edge_w.append(of_edge @ lin_edge.weight)
                edge_b.append(of_edge @ lin_edge.bias + mlp[0].bias)
                angle_w.append(of_angle @ self.lin_edge.weight)
                for m in range(3):
                    lin_frame = self.get_submodule(f"lin_{name}_e{m + 1}")
                    frame_w[m].append(of_frame @ lin_frame.weight)
                    frame_b[m].append(of_frame @ lin_frame.bias)
        frame_terms = [F.linear(frame[:, m], torch.cat(frame_w[m]), torch.cat(frame_b[m])) for m in range(3)]
        gated = edge_attention(
            edge.values,
            angle.values if angle.rows else angle.values.unflatten(0, (-1, 3)),
            torch.stack(frame_terms, dim=1),
            index.crystal_of_edge,
            torch.cat(edge_w),
            torch.cat(edge_b),
            torch.cat(angle_w),
            self.key_update[2],
            self.lin_msg_update[2],
            self.bn_att,
            edge_rows=edge.rows,
            angle_rows=angle.rows,
            count=index.num_real_edges,
            backend=index.backend,
        )
        # The projection is applied once to the sum over three directions, its bias three times.
        out = F.linear(gated, self.lin_concate.weight, 3 * self.lin_concate.bias)
        return residual_norm(edge.expand(), out, self.bn, count=index.num_real_edges, backend=index.backend)


class NodeWiseAttention(_Attention):
    """Node-wise layer of both encoders: x_i ← softplus(x_i + BN(Wc Σ_j v σ(BN(q k / √C))))."""

    def __init__(self, channels: int):
        super().__init__(channels, edge_bias=True)

    def forward(self, node: torch.Tensor, edge: SharedRows, index: GraphIndex) -> torch.Tensor:
        """Update atom features x (N, C) from the features f of E edges."""
        target_w, target_b = [self.lin_query.weight], [self.lin_query.bias]
        source_w, edge_w = [], []
        with torch.autocast(node.device.type, enabled=False):  # merged weights are rounded once
            for lin, mlp in ((self.lin_key, self.key_update), (self.lin_value, self.lin_msg_update)):
                of_target, of_source, of_edge = mlp[0].weight.chunk(3, dim=1)
                target_w.append(of_target @ lin.weight)
                source_w.append(of_source @ lin.weight)
                edge_w.append(of_edge @ self.lin_edge.weight)
                bias = (of_target + of_source) @ lin.bias + of_edge @ self.lin_edge.bias
                target_b.append(bias + mlp[0].bias)
        gated = node_attention(
            node,
            edge.values,
            index.source,
            index.target,
            torch.cat(target_w),
            torch.cat(target_b),
            torch.cat(source_w),
            torch.cat(edge_w),
            self.key_update[2],
            self.lin_msg_update[2],
            self.bn_att,
            edge_rows=edge.rows,
            count=index.num_real_edges,
            backend=index.backend,
        )
        out = self.lin_concate(gated)
        return residual_norm(node, out, self.bn, count=index.num_real_atoms, backend=index.backend)


class _TensorProductBuffers(nn.Module):
    """Buffers that e3nn's tensor product puts into published checkpoints; nothing reads them."""

    def __init__(self, output_dim: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(0))
        self.register_buffer("output_mask", torch.ones(output_dim))


class _TensorProductLayer(nn.Module):
    """Weight network of one tensor product: hidden channels, then the weights of every path."""

    def __init__(self, channels: int, shape: TensorProductShape, output_dim: int):
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels), nn.Softplus(), nn.Linear(channels, shape.weight_rows)
        )
        self.tp = _TensorProductBuffers(output_dim)

    def hidden(self, edge: SharedRows, backend: str) -> torch.Tensor:
        """Compute the hidden channels of E edges, (E, C)."""
        return edge.map(lambda f: softplus(self.fc[0](f), backend=backend)).expand()


class EquivariantUpdate(nn.Module):
    """Equivariant layer of the SO(3) encoder: scalars up to l = 2 and back to scalars."""

    def __init__(self, channels: int, shape: TensorProductShape):
        super().__init__()
        ns, nv = shape.num_scalars, shape.num_vectors
        self.shape = shape
        self.node_linear = nn.Linear(channels, ns)
        self.nlayer_1 = _TensorProductLayer(channels, shape, ns + 3 * nv + 5 * nv)
        self.nlayer_2 = _TensorProductLayer(channels, shape, ns)
        self.bn = BatchNorm(ns)
        self.node_linear_2 = nn.Linear(ns, channels)

    def features(
        self,
        node: torch.Tensor,
        edge: SharedRows,
        edge_vec: torch.Tensor,
        index: GraphIndex,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the equivariant atom features u1: (N, ns) 0e, (N, nv, 3) 1o and (N, nv, 5) 2e."""
        last = self.nlayer_1.fc[2]
        scalars = self.node_linear(node)
        mean, first, second = tensor_product_1(
            scalars,
            self.nlayer_1.hidden(edge, index.backend),
            edge_vec,
            last.weight,
            last.bias,
            self.shape,
            index.source,
            index.target,
            backend=index.backend,
        )
        return mean + scalars, first, second

    def forward(
        self,
        node: torch.Tensor,
        edge: SharedRows,
        edge_vec: torch.Tensor,
        index: GraphIndex,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Update atom features.

        Args:
            node: x, (N, C).
            edge: f of E edges.
            edge_vec: (E, 3), of any unit.
            index: the graph's rows.

        Returns:
            x (N, C) and the l = 1 features on the way, (N, nv, 3).
        """
        last = self.nlayer_2.fc[2]
        features = self.features(node, edge, edge_vec, index)
        scalars = tensor_product_2(
            features,
            self.nlayer_2.hidden(edge, index.backend),
            edge_vec,
            last.weight,
            last.bias,
            self.shape,
            index.source,
            index.target,
            backend=index.backend,
        )
        scalars = softplus(batch_norm(scalars, self.bn, index.num_real_atoms), backend=index.backend)
        return node + softplus(self.node_linear_2(scalars), backend=index.backend), features[1]
