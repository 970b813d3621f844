"""The published MGT in plain PyTorch and e3nn: the oracle of the tests and the baseline of the benchmarks.

Written from the paper's equations (arXiv 2507.15303) and independent of the fast model: dense RBFs, the
inputs of every update concatenated to 3C, one full set of tensor-product weights an edge. Modules carry
the published names, so a published state_dict loads as it is (less two parameters the program never uses;
see `mgt_fast.importer`).

Shapes: N atoms, E edges, B crystals, C channels, ns scalar and nv vector channels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from e3nn import o3
from torch import nn
from torch.nn import functional as F

from mgt_fast.config import MGTConfig
from mgt_fast.elements import cgcnn_features
from mgt_fast.graph import CrystalGraph
from mgt_fast.outputs import EdgeNoise, MGTOutput

TEMPERATURE = 1.0
NOISE_WEIGHT = 0.5


def mean_by_index(values: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """Average the rows of `values` (M, ...) that share an `index` (M,) into (size, ...); no rows give 0."""
    total = values.new_zeros(size, *values.shape[1:]).index_add(0, index, values)
    count = values.new_zeros(size).index_add(0, index, values.new_ones(len(index)))
    return total / count.clamp(min=1).unsqueeze(-1)


def edge_frame_cosines(graph: CrystalGraph) -> torch.Tensor:
    """Cosines between each edge and the three frame vectors of its crystal, clamped to [-1, 1], (E, 3)."""
    frame = graph.frame[graph.batch[graph.edge_index[0]]]  # [E, 3, 3]
    dot = torch.einsum("emx,ex->em", frame, graph.edge_vec)
    return (dot / (frame.norm(dim=-1) * graph.edge_vec.norm(dim=-1, keepdim=True))).clamp(-1, 1)


class RBFExpansion(nn.Module):
    """Gaussians exp(-((x - c) / h)^2) on evenly spaced centres c; the spacing h is a float32 number."""

    def __init__(self, low: float, high: float, bins: int):
        super().__init__()
        self.register_buffer("centers", torch.linspace(low, high, bins, dtype=torch.float32))
        self.spacing = float(np.diff(self.centers.numpy()).mean())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Expand numbers x of any shape (...) into (..., C)."""
        return torch.exp(-(((x.unsqueeze(-1) - self.centers) / self.spacing) ** 2))


def rbf_embedding(low: float, high: float, channels: int, activation: nn.Module) -> nn.Sequential:
    """Return the embedding activation(Linear(RBF(x))) of a scalar."""
    return nn.Sequential(RBFExpansion(low, high, channels), nn.Linear(channels, channels), activation)


def update_mlp(channels: int) -> nn.Sequential:
    """Return the update Linear(3C → C), SiLU, Linear(C → C) of keys and of messages."""
    return nn.Sequential(nn.Linear(3 * channels, channels), nn.SiLU(), nn.Linear(channels, channels))


class EdgeTransformer(nn.Module):
    """Edge-wise layer: every edge attends to the three lattice vectors of its crystal."""

    def __init__(self, channels: int):
        super().__init__()
        self.lin_query = nn.Linear(channels, channels)
        self.lin_key = nn.Linear(channels, channels)
        self.lin_value = nn.Linear(channels, channels)
        for m in (1, 2, 3):
            setattr(self, f"lin_key_e{m}", nn.Linear(channels, channels))
            setattr(self, f"lin_value_e{m}", nn.Linear(channels, channels))
        self.lin_edge = nn.Linear(channels, channels, bias=False)
        self.key_update = update_mlp(channels)
        self.lin_msg_update = update_mlp(channels)
        self.lin_concate = nn.Linear(channels, channels)
        self.bn_att = nn.BatchNorm1d(channels)
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, f: torch.Tensor, lattice: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        """Update edge features f (E, C) from frame (E, 3, C) and angle (E, 3, C) embeddings."""
        E, C = f.shape
        frame_keys = [getattr(self, f"lin_key_e{m + 1}")(lattice[:, m]) for m in range(3)]
        frame_values = [getattr(self, f"lin_value_e{m + 1}")(lattice[:, m]) for m in range(3)]
        query = self.lin_query(f).unsqueeze(1)  # [E, 1, C]
        own_key = self.lin_key(f).unsqueeze(1).expand(E, 3, C)
        own_value = self.lin_value(f).unsqueeze(1).expand(E, 3, C)
        angle = self.lin_edge(angle)
        key = self.key_update(torch.cat([own_key, torch.stack(frame_keys, 1), angle], dim=-1))  # [E, 3, C]
        value = self.lin_msg_update(torch.cat([own_value, torch.stack(frame_values, 1), angle], dim=-1))
        alpha = query * key / math.sqrt(C)
        gate = torch.sigmoid(self.bn_att(alpha.reshape(3 * E, C))).view(E, 3, C)
        out = self.lin_concate(value * gate).sum(dim=1)
        return F.softplus(f + self.bn(out))


class NodeTransformer(nn.Module):
    """Node-wise layer: every atom attends to the edges that point to it (from row 0 to row 1)."""

    def __init__(self, channels: int):
        super().__init__()
        self.lin_query = nn.Linear(channels, channels)
        self.lin_key = nn.Linear(channels, channels)
        self.lin_value = nn.Linear(channels, channels)
        self.lin_edge = nn.Linear(channels, channels)
        self.key_update = update_mlp(channels)
        self.lin_msg_update = update_mlp(channels)
        self.lin_concate = nn.Linear(channels, channels)
        self.bn_att = nn.BatchNorm1d(channels)
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        """Update atom features x (N, C) from edge features f (E, C)."""
        j, i = edge_index
        query, key, value, edge = self.lin_query(x), self.lin_key(x), self.lin_value(x), self.lin_edge(f)
        k = self.key_update(torch.cat([key[i], key[j], edge], dim=-1))  # [E, C]
        v = self.lin_msg_update(torch.cat([value[i], value[j], edge], dim=-1))
        alpha = query[i] * k / math.sqrt(x.shape[1])
        message = v * torch.sigmoid(self.bn_att(alpha))
        out = torch.zeros_like(x).index_add(0, i, message)
        return F.softplus(x + self.bn(self.lin_concate(out)))


class TensorProductConv(nn.Module):
    """Mean over neighbours of an e3nn tensor product whose weights an MLP makes for each edge."""

    def __init__(self, irreps_in: str, irreps_sh: str, irreps_out: str, channels: int):
        super().__init__()
        self.tp = o3.FullyConnectedTensorProduct(
            irreps_in, irreps_sh, irreps_out, shared_weights=False, internal_weights=False
        )
        self.fc = nn.Sequential(
            nn.Linear(channels, channels), nn.Softplus(), nn.Linear(channels, self.tp.weight_numel)
        )

    def forward(self, u, edge_index, sh, f) -> torch.Tensor:
        """Gather u (N, ...) at row 1, multiply by sh (E, 9), average onto row 0: (N, irreps_out.dim)."""
        start, end = edge_index
        return mean_by_index(self.tp(u[end], sh, self.fc(f)), start, len(u))


class EquivariantLayer(nn.Module):
    """SO(3)-equivariant update: scalars up to l = 2 and back, beside the residual stream."""

    IRREPS_SH = "1x0e + 1x1o + 1x2e"

    def __init__(self, channels: int, ns: int, nv: int):
        super().__init__()
        scalars, features = f"{ns}x0e", f"{ns}x0e + {nv}x1o + {nv}x2e"
        self.node_linear = nn.Linear(channels, ns)
        self.nlayer_1 = TensorProductConv(scalars, self.IRREPS_SH, features, channels)
        self.nlayer_2 = TensorProductConv(features, self.IRREPS_SH, scalars, channels)
        self.bn = nn.BatchNorm1d(ns)
        self.node_linear_2 = nn.Linear(ns, channels)
        self.irreps_features = o3.Irreps(features)

    def features(self, x, edge_index, sh, f) -> torch.Tensor:
        """Equivariant atom features u1 of irreps ns×0e + nv×1o + nv×2e, (N, ns + 8 nv)."""
        u = self.node_linear(x)
        u1 = self.nlayer_1(u, edge_index, sh, f)
        return u1 + F.pad(u, (0, u1.shape[1] - u.shape[1]))

    def forward(self, x, edge_index, sh, f) -> torch.Tensor:
        """Update atom features x (N, C) from harmonics sh (E, 9) and edge features f (E, C)."""
        u2 = self.nlayer_2(self.features(x, edge_index, sh, f), edge_index, sh, f)
        return x + F.softplus(self.node_linear_2(F.softplus(self.bn(u2))))


class SE3Encoder(nn.Module):
    """Encoder of SE(3)-invariant scalars: edge lengths, frame lengths and the angles between them."""

    def __init__(self, config: MGTConfig, num_features: int):
        super().__init__()
        C = config.channels
        self.atom_embedding = nn.Linear(num_features, C)
        self.edge_embedding = rbf_embedding(-4.0, 4.0, C, nn.Softplus())
        self.angle_embedding = rbf_embedding(-1.0, 1.0, C, nn.Softplus())
        self.edges_layer = nn.ModuleList(EdgeTransformer(C) for _ in range(config.num_blocks))
        self.atoms_layer = nn.ModuleList(NodeTransformer(C) for _ in range(config.num_blocks))

    def forward(self, atom_features, graph: CrystalGraph, cosine_noise=None) -> torch.Tensor:
        """Return crystal embeddings (B, C) from atom features (N, 92) and clean lengths."""
        crystal = graph.batch[graph.edge_index[0]]
        cosines = edge_frame_cosines(graph)  # [E, 3]
        if cosine_noise is not None:
            cosines = cosines + cosine_noise
        x = self.atom_embedding(atom_features)
        f = self.edge_embedding(-0.75 / graph.edge_vec.norm(dim=-1))
        # The published graphs hold the frame lengths of every edge, so they are embedded edge by edge.
        lattice = self.edge_embedding(-0.75 / graph.frame.norm(dim=-1)[crystal])  # [E, 3, C]
        angle = self.angle_embedding(cosines)  # [E, 3, C]
        for edge_layer, atom_layer in zip(self.edges_layer, self.atoms_layer, strict=True):
            f = edge_layer(f, lattice, angle)
            x = atom_layer(x, graph.edge_index, f)
        return mean_by_index(x, graph.batch, graph.num_crystals)


class SO3Encoder(nn.Module):
    """Encoder of the edge vectors themselves, through spherical harmonics up to l = 2."""

    def __init__(self, config: MGTConfig, num_features: int):
        super().__init__()
        C, ns, nv = config.channels, config.num_scalars, config.num_vectors
        self.atom_embedding = nn.Linear(num_features, C)
        self.edge_embedding = rbf_embedding(-4.0, 4.0, C, nn.SiLU())
        self.equi_update = nn.ModuleList(EquivariantLayer(C, ns, nv) for _ in range(config.num_blocks))
        self.transconv = nn.ModuleList(NodeTransformer(C) for _ in range(config.num_blocks))

    def embed(self, atom_features, edge_vec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return atom features x (N, C), harmonics (E, 9) and edge features f (E, C)."""
        sh = o3.spherical_harmonics(
            EquivariantLayer.IRREPS_SH, edge_vec, normalize=True, normalization="component"
        )
        return self.atom_embedding(atom_features), sh, self.edge_embedding(-0.75 / edge_vec.norm(dim=-1))

    def forward(self, atom_features, graph: CrystalGraph, vector_noise=None) -> torch.Tensor:
        """Return crystal embeddings (B, C) from atom features (N, 92) and (noisy) edge vectors."""
        edge_vec = graph.edge_vec if vector_noise is None else graph.edge_vec + vector_noise
        x, sh, f = self.embed(atom_features, edge_vec)
        for equivariant_layer, atom_layer in zip(self.equi_update, self.transconv, strict=True):
            x = equivariant_layer(x, graph.edge_index, sh, f)
            x = atom_layer(x, graph.edge_index, f)
        return mean_by_index(x, graph.batch, graph.num_crystals)


class ProjectionHead(nn.Module):
    """Residual projection of a crystal embedding, (B, C) → (B, C)."""

    def __init__(self, channels: int, dropout: float):
        super().__init__()
        self.projection = nn.Linear(channels, channels)
        self.fc = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(channels)

    def forward(self, g: torch.Tensor) -> torch.Tensor:
        """Project embeddings g (B, C)."""
        return g + self.layer_norm(self.dropout(F.silu(self.fc(self.projection(g)))))


class NoiseHead(nn.Module):
    """Linear → SiLU → Linear to the three components of a crystal's mean noise, (B, C) → (B, 3)."""

    def __init__(self, channels: int, name: str):
        super().__init__()
        self.name = name
        self.add_module(f"{name}1", nn.Linear(channels, channels))
        self.add_module(f"{name}2", nn.Linear(channels, 3))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Predict the noise from projected embeddings z (B, C)."""
        first, second = self.get_submodule(f"{self.name}1"), self.get_submodule(f"{self.name}2")
        return second(F.silu(first(z)))


class Expert(nn.Module):
    """Prediction from one view, (B, C) → (B, output_dim)."""

    def __init__(self, config: MGTConfig):
        super().__init__()
        self.expert1 = nn.Linear(config.channels, config.expert_hidden)
        self.dropout = nn.Dropout(config.dropout)
        self.expert2 = nn.Linear(config.expert_hidden, config.output_dim)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Predict from projected embeddings z (B, C)."""
        return self.expert2(self.dropout(F.gelu(self.expert1(z))))


class AttentionGate(nn.Module):
    """One-head self-attention over the experts' outputs, (B, 2, output_dim) → the same."""

    def __init__(self, output_dim: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(output_dim, num_heads=1, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Let the tokens of each crystal attend to each other."""
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


class MixtureOfExperts(nn.Module):
    """Router: one expert a view, weighted by attention between their outputs."""

    def __init__(self, config: MGTConfig):
        super().__init__()
        self.experts = nn.ModuleList(Expert(config) for _ in range(2))
        self.attention_gate = AttentionGate(config.output_dim)
        self.projection = nn.Linear(2 * config.output_dim, config.output_dim)

    def forward(self, views: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return predictions (B, output_dim) and the share of each view in them (B, 2).

        A prediction is b + sum_k W_k (expert_k * attention_k); the share of view k is the mean size of
        its term over the sum of both, one half each where both vanish.
        """
        tokens = torch.stack([expert(z) for expert, z in zip(self.experts, views, strict=True)], dim=1)
        weighted = tokens * self.attention_gate(tokens)  # [B, 2, output_dim]
        prediction = self.projection(weighted.flatten(1))
        weights = self.projection.weight.unflatten(1, (2, -1))  # [output_dim, 2, output_dim]
        size = torch.einsum("bkj,okj->bko", weighted, weights).detach().abs().mean(dim=-1)  # [B, 2]
        total = size.sum(dim=1, keepdim=True)
        return prediction, torch.where(total > 0, size / total, 0.5)


class ReferenceMGT(nn.Module):
    """The published MGT: SE(3) and SO(3) encoders, projection heads, and denoising heads or router.

    Raises:
        ValueError: if `config` asks for anything but the published model.
    """

    def __init__(self, config: MGTConfig):
        super().__init__()
        if (config.views, config.fusion, config.denoising) != ("both", "router", "crystal"):
            raise ValueError(
                "the reference covers the published model only (views='both', fusion='router', "
                f"denoising='crystal'), not views={config.views!r}, fusion={config.fusion!r}, "
                f"denoising={config.denoising!r}; use mgt_fast.MGT for these"
            )
        self.config = config
        features = cgcnn_features()
        self.register_buffer("atom_features", features, persistent=False)  # [119, 92], row = Z
        self.se3_graph_encoder = SE3Encoder(config, features.shape[1])
        self.so3_graph_encoder = SO3Encoder(config, features.shape[1])
        self.se3_projection_encoder = ProjectionHead(config.channels, config.dropout)
        self.so3_projection_encoder = ProjectionHead(config.channels, config.dropout)
        if config.task == "pretrain":
            self.se3_angle_layer = NoiseHead(config.channels, "anglayer")
            self.so3_edge_layer = NoiseHead(config.channels, "edgelayer")
        else:
            self.mixture_of_experts = MixtureOfExperts(config)

    def forward(self, graph: CrystalGraph, noise: EdgeNoise | None = None) -> MGTOutput:
        """Embed the crystals of `graph` and predict; `noise` disturbs what each view sees.

        The SE(3) view sees clean lengths and noisy cosines, the SO(3) view noisy edge vectors and their
        lengths. Clean cosines are clamped to [-1, 1], noisy ones are not.

        Raises:
            ValueError: for an element without features; the message names the atomic number.
        """
        graph = graph.to(dtype=self.atom_features.dtype)
        atom_features = self.atom_features[graph.numbers]
        if atom_features.isnan().any():
            unknown = graph.numbers[atom_features.isnan().any(dim=1)].unique().tolist()
            raise ValueError(f"no CGCNN features for atomic numbers {unknown}; leave these crystals out")
        cosine = None if noise is None else noise.cosine.to(graph.edge_vec)
        vector = None if noise is None else noise.vector.to(graph.edge_vec)
        se3_pool = self.se3_graph_encoder(atom_features, graph, cosine)
        so3_pool = self.so3_graph_encoder(atom_features, graph, vector)
        se3_proj = self.se3_projection_encoder(se3_pool)
        so3_proj = self.so3_projection_encoder(so3_pool)
        embeddings = {"se3_pool": se3_pool, "so3_pool": so3_pool, "se3_proj": se3_proj, "so3_proj": so3_proj}
        if self.config.task == "pretrain":
            return MGTOutput(
                **embeddings,
                se3_noise=self.se3_angle_layer(se3_proj),
                so3_noise=self.so3_edge_layer(so3_proj),
            )
        prediction, contributions = self.mixture_of_experts([se3_proj, so3_proj])
        return MGTOutput(**embeddings, prediction=prediction, contributions=contributions)


def reference_nt_xent(z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
    """NT-Xent loss of two views (B, C): row b of one is the positive of row b of the other."""
    B = len(z_a)
    z = F.normalize(torch.cat([z_a, z_b]), dim=1)  # [2B, C]
    itself = torch.eye(2 * B, dtype=torch.bool, device=z.device)
    logits = (z @ z.T / TEMPERATURE).masked_fill(itself, -math.inf)
    return F.cross_entropy(logits, torch.arange(2 * B, device=z.device).roll(B))


def crystal_mean_noise(graph: CrystalGraph, noise: torch.Tensor) -> torch.Tensor:
    """Mean over a crystal's atoms of the mean noise (E, 3) of the edges that point to them, (B, 3)."""
    by_atom = mean_by_index(noise, graph.edge_index[1], graph.num_atoms)
    return mean_by_index(by_atom, graph.batch, graph.num_crystals)


def reference_pretraining_loss(
    output: MGTOutput, graph: CrystalGraph, noise: EdgeNoise
) -> dict[str, torch.Tensor]:
    """NT-Xent between the views plus half the summed squared error of each denoising head.

    Returns:
        "loss", its parts "contrastive", "se3_loss", "so3_loss" (scalars), and the denoising targets
        "se3_target", "so3_target", (B, 3).
    """
    contrastive = reference_nt_xent(output.se3_proj, output.so3_proj)
    se3_target = crystal_mean_noise(graph, noise.cosine)
    so3_target = crystal_mean_noise(graph, noise.vector)
    se3_loss = F.mse_loss(output.se3_noise, se3_target, reduction="sum")
    so3_loss = F.mse_loss(output.so3_noise, so3_target, reduction="sum")
    return {
        "loss": contrastive + NOISE_WEIGHT * (se3_loss + so3_loss),
        "contrastive": contrastive,
        "se3_loss": se3_loss,
        "so3_loss": so3_loss,
        "se3_target": se3_target,
        "so3_target": so3_target,
    }
