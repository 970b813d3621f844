"""The Multi-view Graph Transformer (arXiv 2507.15303): two encoders of one crystal graph, and their fusion.

Letters: N atoms, E edges, B crystals, C channels, m = 1, 2, 3 the directions of the lattice frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .config import MGTConfig
from .graph import CrystalGraph
from .kernels import check_backend, resolve_backend
from .kernels.geometry import invariant_geometry, inverse_length
from .kernels.random import fork_keys, uniform
from .kernels.segments import SharedRows, gather_rows, segment_mean
from .kernels.tensor_product import TensorProductShape
from .layers import (
    AtomEmbedding,
    EdgeWiseAttention,
    EquivariantUpdate,
    GraphIndex,
    NodeWiseAttention,
    RBFEmbedding,
    run_layer,
)
from .outputs import EdgeNoise, MGTOutput


@dataclass(frozen=True)
class Encoding:
    """What an encoder computes: features of crystals (B, C), atoms (N, C) and E edges.

    `directions` carries the geometry that the per-edge denoising head needs: the angle embeddings
    (E·3 rows) in the SE(3) view, the l = 1 atom features (N, nv, 3) in the SO(3) view.
    """

    pool: torch.Tensor
    node: torch.Tensor
    edge: SharedRows
    directions: SharedRows | torch.Tensor


class SE3Encoder(nn.Module):
    """SE(3)-invariant transformer: distances, and angles to the lattice frame."""

    def __init__(self, config: MGTConfig):
        super().__init__()
        channels, blocks = config.channels, range(config.num_blocks)
        self.atom_embedding = AtomEmbedding(channels)
        self.edge_embedding = RBFEmbedding(-4.0, 4.0, channels, "softplus")
        self.angle_embedding = RBFEmbedding(-1.0, 1.0, channels, "softplus")
        self.edges_layer = nn.ModuleList(EdgeWiseAttention(channels) for _ in blocks)
        self.atoms_layer = nn.ModuleList(NodeWiseAttention(channels) for _ in blocks)

    def forward(self, graph: CrystalGraph, index: GraphIndex, cosine_noise: torch.Tensor | None) -> Encoding:
        """Encode the graph; the noise, if any, is added to the angle cosines alone."""
        backend = index.backend
        lengths, cosines = invariant_geometry(
            graph.edge_vec, graph.frame, index.crystal_of_edge, cosine_noise, backend=backend
        )
        frame_lengths = inverse_length(graph.frame, backend=backend)  # [B, 3]
        node = self.atom_embedding(graph.numbers)
        edge = self.edge_embedding(lengths, backend)
        angle = self.angle_embedding(cosines.flatten(), backend)  # E·3 rows
        frame = self.edge_embedding(frame_lengths.flatten(), backend).expand().unflatten(0, (-1, 3))
        for edge_wise, node_wise in zip(self.edges_layer, self.atoms_layer, strict=True):
            edge = SharedRows(run_layer(edge_wise, edge, angle, frame, index=index))
            node = run_layer(node_wise, node, edge, index=index)
        return Encoding(segment_mean(node, index.crystal, backend=backend), node, edge, angle)


class SO3Encoder(nn.Module):
    """SO(3)-equivariant encoder: tensor products up to l = 2 between atom features and edge directions."""

    def __init__(self, config: MGTConfig):
        super().__init__()
        channels, blocks = config.channels, range(config.num_blocks)
        shape = TensorProductShape(config.num_scalars, config.num_vectors)
        self.atom_embedding = AtomEmbedding(channels)
        self.edge_embedding = RBFEmbedding(-4.0, 4.0, channels, "silu")
        self.equi_update = nn.ModuleList(EquivariantUpdate(channels, shape) for _ in blocks)
        self.transconv = nn.ModuleList(NodeWiseAttention(channels) for _ in blocks)

    def forward(self, graph: CrystalGraph, index: GraphIndex, vector_noise: torch.Tensor | None) -> Encoding:
        """Encode the graph; the noise, if any, is added to the edge vectors."""
        edge_vec = graph.edge_vec if vector_noise is None else graph.edge_vec + vector_noise
        node = self.atom_embedding(graph.numbers)
        edge = self.edge_embedding(inverse_length(edge_vec, backend=index.backend), index.backend)
        for equivariant, node_wise in zip(self.equi_update, self.transconv, strict=True):
            node, vectors = run_layer(equivariant, node, edge, edge_vec, index=index)
            node = run_layer(node_wise, node, edge, index=index)
        return Encoding(segment_mean(node, index.crystal, backend=index.backend), node, edge, vectors)


class Dropout(nn.Dropout):
    """Dropout of crystals' features, which a crystal's key decides where there is one.

    Args:
        p: share of the features that become zero in training.
        purpose: a number of its own, so that one key drops other features elsewhere.
    """

    def __init__(self, p: float, purpose: int):
        super().__init__(p)
        self.purpose = purpose

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Drop features of x, (B, C); keys (B,) int64, None: torch's generator decides."""
        if keys is None or not self.training or self.p == 0:
            return super().forward(x)
        if self.p == 1:
            return x * 0
        kept = uniform(fork_keys(keys, self.purpose), x.shape[1]) >= self.p
        return x * kept.to(x.dtype).div_(1 - self.p)


class ProjectionHead(nn.Module):
    """g ↦ g + LayerNorm(dropout(SiLU(Linear(Linear(g)))))."""

    def __init__(self, config: MGTConfig, view: int):
        super().__init__()
        self.projection = nn.Linear(config.channels, config.channels)
        self.fc = nn.Linear(config.channels, config.channels)
        self.dropout = Dropout(config.dropout, purpose=1 + view)
        self.layer_norm = nn.LayerNorm(config.channels)

    def forward(self, pool: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Project crystal embeddings, (B, C) → (B, C)."""
        return pool + self.layer_norm(self.dropout(F.silu(self.fc(self.projection(pool))), keys))


class Expert(nn.Module):
    """Two-layer network from crystal embeddings to predictions."""

    def __init__(self, input_dim: int, config: MGTConfig, view: int = 0):
        super().__init__()
        self.expert1 = nn.Linear(input_dim, config.expert_hidden)
        self.dropout = Dropout(config.dropout, purpose=3 + view)
        self.expert2 = nn.Linear(config.expert_hidden, config.output_dim)

    def forward(self, embedding: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Predict, (B, input_dim) → (B, output_dim)."""
        return self.expert2(self.dropout(F.gelu(self.expert1(embedding)), keys))


class MixtureOfExperts(nn.Module):
    """One expert a view, and a router: one-head self-attention between the experts' outputs."""

    def __init__(self, config: MGTConfig):
        super().__init__()
        self.experts = nn.ModuleList(Expert(config.channels, config, view) for view in range(2))
        self.attention_gate = nn.ModuleDict(
            {"attention": nn.MultiheadAttention(config.output_dim, num_heads=1, batch_first=True)}
        )
        self.projection = nn.Linear(2 * config.output_dim, config.output_dim)

    def forward(
        self, *views: torch.Tensor, keys: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fuse two embeddings (B, C) into a prediction (B, output_dim) and each view's share (B, 2).

        A view's share is the size of its term in the final linear map relative to both terms' sizes.
        """
        tokens = torch.stack(
            [expert(view, keys) for expert, view in zip(self.experts, views, strict=True)], dim=1
        )
        gate, _ = self.attention_gate["attention"](tokens, tokens, tokens, need_weights=False)
        routed = tokens * gate  # [B, 2, output_dim]
        weight = self.projection.weight.unflatten(1, (2, -1))  # [output_dim, 2, output_dim]
        size = torch.einsum("bko,pko->bkp", routed.detach(), weight.detach()).abs().mean(2)
        total = size.sum(1, keepdim=True)
        shares = torch.where(total > 0, size / total, 0.5)
        return self.projection(routed.flatten(1)), shares


class CrystalNoiseHead(nn.Module):
    """Published denoising head: the crystal's mean noise from its projected embedding."""

    def __init__(self, channels: int, name: str):
        super().__init__()
        self.names = (f"{name}1", f"{name}2")
        self.add_module(self.names[0], nn.Linear(channels, channels))
        self.add_module(self.names[1], nn.Linear(channels, 3))

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Predict, (B, C) → (B, 3)."""
        first, second = (self.get_submodule(name) for name in self.names)
        return second(F.silu(first(embedding)))


class EdgeNoiseHead(nn.Module):
    """Per-edge denoising head: invariant coefficients of each edge from its own and its atoms' features."""

    def __init__(self, channels: int, output_dim: int):
        super().__init__()
        self.edge = nn.Linear(channels, channels)
        self.source = nn.Linear(channels, channels, bias=False)
        self.target = nn.Linear(channels, channels, bias=False)
        self.out = nn.Linear(channels, output_dim)
        # Noise is far smaller than a fresh layer's output; zero is the best guess before anything is learnt.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, encoding: Encoding, index: GraphIndex, extra: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Predict (E, output_dim), or (E, 3, output_dim) with `extra` (E, 3, C) added to the hidden layer."""
        hidden = encoding.edge.map(self.edge).expand()
        hidden = hidden + gather_rows(self.source(encoding.node), index.source, backend=index.backend)
        hidden = hidden + gather_rows(self.target(encoding.node), index.target, backend=index.backend)
        return self.out(F.silu(hidden if extra is None else hidden[:, None] + extra))


class SE3EdgeNoise(nn.Module):
    """Noise of each angle cosine; the three directions share one head."""

    def __init__(self, config: MGTConfig):
        super().__init__()
        self.angle = nn.Linear(config.channels, config.channels, bias=False)
        self.head = EdgeNoiseHead(config.channels, 1)

    def forward(self, encoding: Encoding, index: GraphIndex) -> torch.Tensor:
        """Predict (E, 3)."""
        angle = encoding.directions.map(self.angle).expand().unflatten(0, (-1, 3))  # [E, 3, C]
        return self.head(encoding, index, angle).squeeze(2)


class SO3EdgeNoise(nn.Module):
    """Noise of each edge vector, equivariant: along the edge and along its atoms' l = 1 features."""

    def __init__(self, config: MGTConfig):
        super().__init__()
        self.head = EdgeNoiseHead(config.channels, 1 + 2 * config.num_vectors)

    def forward(self, encoding: Encoding, index: GraphIndex, edge_vec: torch.Tensor) -> torch.Tensor:
        """Predict (E, 3), Å."""
        vectors = encoding.directions
        at_source, at_target = (
            gather_rows(vectors.flatten(1), atom, backend=index.backend).view(-1, *vectors.shape[1:])
            for atom in (index.source, index.target)
        )
        unit = F.normalize(edge_vec, dim=1)[:, None]
        basis = torch.cat((unit, at_source, at_target), dim=1)  # [E, 1 + 2nv, 3]
        return (self.head(encoding, index)[:, :, None] * basis).sum(1)


class MGT(nn.Module):
    """Multi-view Graph Transformer.

    Args:
        config: sizes, task, views and fusion.
        backend: "torch" (merged algebra in plain PyTorch, any device), "triton" (fused kernels, CUDA), or
            "auto": Triton where the parameters are on a CUDA device, PyTorch elsewhere.

    Attributes:
        recompute: whether each layer keeps its inputs alone for the backward pass and is computed again
            there, which takes less memory and more time and changes nothing else.

    The parameters' names are the published program's, so its checkpoints load (`mgt-fast import-checkpoint`).
    """

    def __init__(self, config: MGTConfig | None = None, backend: str = "auto"):
        super().__init__()
        self.config = config = config or MGTConfig()
        self.backend = check_backend(backend)
        self.recompute = False
        if config.views != "so3":
            self.se3_graph_encoder = SE3Encoder(config)
            self.se3_projection_encoder = ProjectionHead(config, view=0)
        if config.views != "se3":
            self.so3_graph_encoder = SO3Encoder(config)
            self.so3_projection_encoder = ProjectionHead(config, view=1)
        if config.task == "pretrain":
            if config.views != "so3":
                self.se3_angle_layer = (
                    SE3EdgeNoise(config)
                    if config.denoising == "edge"
                    else CrystalNoiseHead(config.channels, "anglayer")
                )
            if config.views != "se3":
                self.so3_edge_layer = (
                    SO3EdgeNoise(config)
                    if config.denoising == "edge"
                    else CrystalNoiseHead(config.channels, "edgelayer")
                )
        elif config.views != "both":
            self.expert = Expert(config.channels, config)
        elif config.fusion == "concat":
            self.expert = Expert(2 * config.channels, config)
        else:
            self.mixture_of_experts = MixtureOfExperts(config)

    def forward(
        self, graph: CrystalGraph, noise: EdgeNoise | None = None, keys: torch.Tensor | None = None
    ) -> MGTOutput:
        """Encode, project and predict.

        Args:
            graph: B crystals; lengths are converted to the parameters' dtype.
            noise: added to the views' geometry (pretraining); converted likewise.
            keys: decide each crystal's dropout, (B,) int64 (see `kernels.random`); None leaves it to torch's
                generator.

        Returns:
            Every intermediate result that a loss or a report needs; see `MGTOutput`.
        """
        dtype = next(self.parameters()).dtype
        graph = graph.to(dtype=dtype)
        if noise is not None:
            noise = EdgeNoise(cosine=noise.cosine.to(dtype), vector=noise.vector.to(dtype))
        backend = resolve_backend(self.backend, graph.numbers.device)
        config, index, out = self.config, GraphIndex(graph, backend, self.recompute), {}
        if config.views != "so3":
            se3 = self.se3_graph_encoder(graph, index, None if noise is None else noise.cosine)
            out["se3_pool"], out["se3_proj"] = se3.pool, self.se3_projection_encoder(se3.pool, keys)
        if config.views != "se3":
            so3 = self.so3_graph_encoder(graph, index, None if noise is None else noise.vector)
            out["so3_pool"], out["so3_proj"] = so3.pool, self.so3_projection_encoder(so3.pool, keys)

        if config.task == "pretrain":
            per_edge = config.denoising == "edge"
            if config.views != "so3":
                head = self.se3_angle_layer
                out["se3_noise"] = head(se3, index) if per_edge else head(out["se3_proj"])
            if config.views != "se3":
                head = self.so3_edge_layer
                noisy = graph.edge_vec if noise is None else graph.edge_vec + noise.vector
                out["so3_noise"] = head(so3, index, noisy) if per_edge else head(out["so3_proj"])
            return MGTOutput(**out, index=index)

        views = [out[name] for name in ("se3_proj", "so3_proj") if name in out]
        if config.views == "both" and config.fusion == "router":
            out["prediction"], out["contributions"] = self.mixture_of_experts(*views, keys=keys)
        else:
            out["prediction"] = self.expert(torch.cat(views, dim=1), keys)
            if config.views != "both":
                out["contributions"] = shares = views[0].new_zeros(graph.num_crystals, 2)
                shares[:, ("se3", "so3").index(config.views)] = 1
        return MGTOutput(**out)

    @classmethod
    def load(cls, path: str | Path, *, backend: str = "auto", device: str = "cpu") -> MGT:
        """Load a network and its target scaling from a checkpoint file or run folder."""
        from .checkpoint import load_model

        return load_model(path, backend=backend, device=device)

    def predict(self, structures, *, ids=None, batch_size: int = 64):
        """Predict pymatgen Structures and ASE Atoms; see `mgt_fast.inference.predict_structures`."""
        from .inference import predict_structures

        return predict_structures(self, structures, ids=ids, batch_size=batch_size)
