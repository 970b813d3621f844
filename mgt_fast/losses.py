"""Label-free objectives: contrast between the views, and denoising of each view's geometry; crystal means."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from .graph import CrystalGraph
from .kernels.precision import accumulator_dtype
from .kernels.random import fork_keys, normal
from .kernels.segments import segment_mean
from .layers import GraphIndex
from .outputs import EdgeNoise, MGTOutput

SIMILARITIES = 2**26
"""Similarities of embeddings that are in memory at once where the contrast is computed in blocks."""

NOISE = 0
"""Purpose of the random numbers that become noise; `model.Dropout` has others."""


def draw_noise(graph: CrystalGraph, std: float, keys: torch.Tensor | None = None) -> EdgeNoise:
    """Draw independent Gaussian noise for every angle cosine and edge vector.

    Args:
        graph: the crystals.
        std: standard deviation; of the cosines without unit, of the vectors in Å (published: 0.05).
        keys: a crystal's key and an edge's place in its crystal decide the edge's noise, (B,) int64 (see
            `kernels.random`); None draws them from torch's generator.
    """
    if keys is None:
        keys = torch.randint(2**62, (graph.num_crystals,), device=graph.batch_ptr.device)
    crystal = GraphIndex(graph).crystal_of_edge
    place = torch.arange(graph.num_edges, device=keys.device) - crystal.ptr[crystal.index]
    keys = fork_keys(keys, NOISE)[crystal.index]
    noise = normal(fork_keys(keys, place), 6, graph.edge_vec.dtype).mul_(std)
    return EdgeNoise(cosine=noise[:, :3], vector=noise[:, 3:])


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
    unit = _unit_rows(z_a, z_b)
    return _sum_over_anchors(unit, 0, unit.shape[0], temperature) / unit.shape[0]


def nt_xent_part(
    z_a: torch.Tensor, z_b: torch.Tensor, temperature: float = 1.0, *, part: int = 0, parts: int = 1
) -> torch.Tensor:
    """Return what one of so many parts of the anchors adds to `nt_xent`, a scalar without gradient.

    Memory is bounded as in `nt_xent_gradient`.
    """
    with torch.no_grad():
        unit = _unit_rows(z_a, z_b)
        loss = unit.new_zeros(())
        for start, stop in _blocks_of_anchors(unit.shape[0], part, parts):
            loss += _sum_over_anchors(unit, start, stop, temperature) / unit.shape[0]
        return loss


def nt_xent_gradient(
    z_a: torch.Tensor, z_b: torch.Tensor, temperature: float = 1.0, *, part: int = 0, parts: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `nt_xent` and its gradient with respect to both embeddings, (2, B, C), or a part of either.

    Blocks of at most `SIMILARITIES` similarities are worked on one after the other, so that about four such
    arrays are in memory, 1 GiB in float32, however large the batch.

    Args:
        z_a, z_b, temperature: see `nt_xent`.
        part, parts: the anchors that are summed over are one of so many parts; the parts' losses and
            gradients add up to the whole.
    """
    with torch.enable_grad():
        z = torch.stack((z_a.detach(), z_b.detach())).requires_grad_()
        unit = _unit_rows(*z)
        leaf = unit.detach().requires_grad_()
        loss, gradient = leaf.new_zeros(()), torch.zeros_like(leaf)
        for start, stop in _blocks_of_anchors(leaf.shape[0], part, parts):
            some = _sum_over_anchors(leaf, start, stop, temperature) / leaf.shape[0]
            loss += some.detach()
            gradient += torch.autograd.grad(some, leaf)[0]
        return loss, torch.autograd.grad(unit, z, gradient)[0]


def _blocks_of_anchors(num_anchors: int, part: int, parts: int) -> Iterator[tuple[int, int]]:
    """Yield first and last anchor of the blocks of a part; each anchor has `num_anchors` similarities."""
    first, last = (num_anchors * edge // parts for edge in (part, part + 1))
    size = max(SIMILARITIES // num_anchors, 1)
    for start in range(first, last, size):
        yield start, min(start + size, last)


def _unit_rows(z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
    """Embeddings of both views one below the other, of length 1, in float32 or better."""
    z = torch.cat((z_a, z_b))
    return F.normalize(z.to(accumulator_dtype(z.dtype)), dim=1)


def _sum_over_anchors(unit: torch.Tensor, start: int, stop: int, temperature: float) -> torch.Tensor:
    """Sum of −log softmax of the positive pair, over the anchors from `start` to `stop`."""
    n = unit.shape[0]
    anchor = torch.arange(start, stop, device=unit.device)
    with torch.autocast(unit.device.type, enabled=False):
        similarity = unit[start:stop] @ unit.t() / temperature
        similarity = similarity.masked_fill(
            anchor[:, None] == torch.arange(n, device=unit.device), -torch.inf
        )
    return F.cross_entropy(similarity, (anchor + n // 2) % n, reduction="sum")


def noise_per_crystal(noise: torch.Tensor, index: GraphIndex) -> torch.Tensor:
    """Mean over atoms of the mean over incoming edges (row 1), (E, 3) → (B, 3): the published target."""
    return segment_mean(segment_mean(noise, index.target), index.crystal)


def denoising_losses(
    output: MGTOutput,
    graph: CrystalGraph,
    noise: EdgeNoise,
    *,
    denoising: Literal["crystal", "edge"] = "crystal",
    noise_std: float = 1.0,
    num_edges: torch.Tensor | int | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the SE(3) and the SO(3) view's denoising loss; None for a view that the network lacks.

    Over the parts of a batch they add up to those of the batch.

    Args:
        output: of a network with task "pretrain"; its index, where it has one, saves sorting the edges again.
        graph: the crystals.
        noise: what was added to them.
        denoising: "crystal": squared error of the crystal's mean noise, summed over the crystals (published);
            "edge": squared error of each edge's noise in units of its variance, averaged over the edges.
        noise_std: standard deviation of the noise, used by "edge".
        num_edges: of the batch that the graph is a part of, used by "edge"; None: it is the whole batch.

    Raises:
        ValueError: if the network's denoising heads are of the other kind, or the graph is padded.

    Source:
        arXiv 2507.15303, pretraining objective; per-edge denoising is this project's own.
    """
    if denoising not in ("crystal", "edge"):
        raise ValueError(f"denoising = {denoising!r}; choose crystal or edge")
    if graph.num_real is not None:
        raise ValueError("the pretraining losses take no padded graph; give the graph it was made from")
    index = output.index or GraphIndex(graph)

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
        if denoising == "crystal":
            return error.square().sum()
        return (error / noise_std).square().sum() / (graph.num_edges if num_edges is None else num_edges)

    return denoise(output.se3_noise, noise.cosine), denoise(output.so3_noise, noise.vector)


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
    """Weigh contrast and denoising of one whole batch together.

    Args:
        output, graph, noise, denoising, noise_std: see `denoising_losses`.
        temperature: of the contrastive loss.
        weights: of contrast, SE(3) and SO(3) denoising.

    Raises:
        ValueError: as `denoising_losses`.

    Source:
        arXiv 2507.15303, pretraining objective.
    """
    contrastive = None
    if output.se3_proj is not None and output.so3_proj is not None:
        contrastive = nt_xent(output.se3_proj, output.so3_proj, temperature)
    denoised = denoising_losses(output, graph, noise, denoising=denoising, noise_std=noise_std)
    parts = (contrastive, *denoised)
    total = sum(weight * part for weight, part in zip(weights, parts, strict=True) if part is not None)
    return PretrainingLoss(total, *parts)
