"""Label-free objectives: contrast between the views, and denoising of each view's geometry; crystal means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from .graph import CrystalGraph
from .kernels.precision import accumulator_dtype
from .kernels.segments import segment_mean
from .layers import GraphIndex
from .outputs import EdgeNoise, MGTOutput


def draw_noise(graph: CrystalGraph, std: float, generator: torch.Generator | None = None) -> EdgeNoise:
    """Draw independent Gaussian noise for every angle cosine and edge vector.

    Args:
        graph: the crystals.
        std: standard deviation; of the cosines without unit, of the vectors in Å (published: 0.05).
        generator: source of randomness, on the graph's device.
    """
    vec = graph.edge_vec
    cosine, vector = std * torch.randn(2, *vec.shape, generator=generator, dtype=vec.dtype, device=vec.device)
    return EdgeNoise(cosine=cosine, vector=vector)


def mean_over_crystals(values: torch.Tensor, graph: CrystalGraph) -> torch.Tensor:
    """Average one value a crystal, (B,), over those that are no filler of a padded graph."""
    if graph.num_real is None:
        return values.mean()
    count = graph.num_real[0]
    return values.where(torch.arange(values.shape[0], device=values.device) < count, 0).sum() / count


def nt_xent(z_a: torch.Tensor, z_b: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Normalised-temperature cross-entropy between two views of the same B crystals.

    Args:
        z_a, z_b: embeddings, (B, C); row b of both belongs to crystal b. B is read from the input.
        temperature: divides the cosine similarities.

    Returns:
        The mean over 2B anchors of −log softmax of the positive pair among the 2B − 1 others, a scalar.

    Source:
        Chen et al., arXiv 2002.05709, equation 1.
    """
    if z_a.shape != z_b.shape:
        raise ValueError(f"the views' embeddings differ in shape: {tuple(z_a.shape)}, {tuple(z_b.shape)}")
    n = z_a.shape[0]
    z = torch.cat((z_a, z_b))
    z = F.normalize(z.to(accumulator_dtype(z.dtype)), dim=1)
    with torch.autocast(z.device.type, enabled=False):
        similarity = (z @ z.t() / temperature).fill_diagonal_(float("-inf"))
    positive = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(similarity, positive)


def noise_per_crystal(noise: torch.Tensor, index: GraphIndex) -> torch.Tensor:
    """Mean over atoms of the mean over incoming edges (row 1), (E, 3) → (B, 3): the published target."""
    return segment_mean(segment_mean(noise, index.target), index.crystal)


@dataclass(frozen=True)
class PretrainingLoss:
    """The loss and its parts, scalars; a part that the configuration leaves out is None."""

    total: torch.Tensor
    contrastive: torch.Tensor | None
    se3_denoising: torch.Tensor | None
    so3_denoising: torch.Tensor | None


def pretraining_loss(
    output: MGTOutput,
    graph: CrystalGraph,
    noise: EdgeNoise,
    *,
    denoising: Literal["crystal", "edge"] = "crystal",
    noise_std: float = 1.0,
    temperature: float = 1.0,
    weights: tuple[float, float, float] = (1.0, 0.5, 0.5),
) -> PretrainingLoss:
    """Weigh contrast and denoising together.

    Args:
        output: of a network with task "pretrain".
        graph: the crystals.
        noise: what was added to them.
        denoising: "crystal": squared error of the crystal's mean noise, summed over the batch (published);
            "edge": squared error of each edge's noise in units of its variance, averaged over edges.
        noise_std: standard deviation of the noise, used by "edge".
        temperature: of the contrastive loss.
        weights: of contrast, SE(3) and SO(3) denoising.

    Raises:
        ValueError: if the network's denoising heads are of the other kind, or the graph is padded.

    Source:
        arXiv 2507.15303, pretraining objective; per-edge denoising is this project's own.
    """
    if denoising not in ("crystal", "edge"):
        raise ValueError(f"denoising = {denoising!r}; choose crystal or edge")
    if graph.num_real is not None:
        raise ValueError("the pretraining losses take no padded graph; give the graph it was made from")
    index = GraphIndex(graph)

    def denoise(predicted: torch.Tensor | None, added: torch.Tensor) -> torch.Tensor | None:
        if predicted is None:
            return None
        target = added if denoising == "edge" else noise_per_crystal(added, index)
        if predicted.shape != target.shape:
            raise ValueError(
                f"denoising = {denoising!r} has targets of shape {tuple(target.shape)}, but the network "
                f"predicts {tuple(predicted.shape)}: it was made for the other kind"
            )
        wide = accumulator_dtype(predicted.dtype)
        error = predicted.to(wide) - target.to(wide)
        return (error / noise_std).square().sum(1).mean() if denoising == "edge" else error.square().sum()

    contrastive = None
    if output.se3_proj is not None and output.so3_proj is not None:
        contrastive = nt_xent(output.se3_proj, output.so3_proj, temperature)
    parts = (contrastive, denoise(output.se3_noise, noise.cosine), denoise(output.so3_noise, noise.vector))
    total = sum(weight * part for weight, part in zip(weights, parts, strict=True) if part is not None)
    return PretrainingLoss(total, *parts)
