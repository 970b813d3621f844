"""One training step: the gradients of a global batch, and the update they make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch

from ..distributed import Ranks
from ..graph import CrystalGraph
from ..kernels.statistics import ChunkStatistics, RankStatistics, norms_of, set_statistics
from ..profiling import span


@dataclass(frozen=True)
class Chunk:
    """Crystals that a rank works on at once.

    Attributes:
        graph: their graphs, on the device.
        crystals: their positions in the dataset, (b,) int64.
        places: their places in the global batch, (b,) int64 on the device.
        keys: what decides their noise and dropout in this step, (b,) int64 on the device.
    """

    graph: CrystalGraph
    crystals: np.ndarray
    places: torch.Tensor
    keys: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch.

    Attributes:
        epoch, number: see `plan.Split`.
        size: crystals of the global batch.
        num_edges: edges of the global batch.
        chunks: of this rank, usually one.
        chunked: whether any rank has several.
        recompute: whether layers are computed again in the backward pass.
    """

    epoch: int
    number: int
    size: int
    num_edges: int
    chunks: tuple[Chunk, ...]
    chunked: bool = False
    recompute: bool = False

    @property
    def ids(self) -> list[str]:
        """Names of this rank's crystals."""
        return [name for chunk in self.chunks for name in chunk.graph.ids]


@dataclass(frozen=True)
class ChunkLoss:
    """What a chunk adds to a batch's loss.

    Attributes:
        loss: its share of the part of the loss that is a sum over crystals, a scalar.
        figures: its shares of figures to report, detached scalars.
        embeddings: of its crystals, (2, b, C), if the loss also compares crystals.
    """

    loss: torch.Tensor
    figures: dict[str, torch.Tensor]
    embeddings: torch.Tensor | None = None


@dataclass(frozen=True)
class JointLoss:
    """The part of a loss that compares the crystals of a global batch: value, gradient (2, B, C), figures.

    Each rank computes a share of it; the shares add up. The gradient is None where none was asked for.
    """

    loss: torch.Tensor
    gradient: torch.Tensor | None
    figures: dict[str, torch.Tensor]


class StepTask(Protocol):
    """What a step asks of a task.

    Attributes:
        model: the network.
        compares_crystals: whether chunks give embeddings, and `joint_loss` compares them.
    """

    model: torch.nn.Module
    compares_crystals: bool

    def forward(self, batch: Batch, chunk: Chunk) -> ChunkLoss:
        """Compute what a chunk adds to the loss of its batch."""

    def joint_loss(self, embeddings: torch.Tensor, ranks: Ranks, gradient: bool) -> JointLoss:
        """Compute a rank's share of what compares a batch's crystals by their embeddings, (2, B, C)."""


@dataclass(frozen=True)
class StepResult:
    """What a step found: the loss, the norm of the whole gradient before clipping, and the task's figures.

    All are those of the global batch, the same on every rank. `votes` are the sums of what each rank gave to
    the step; None if there is one rank.
    """

    loss: torch.Tensor
    norm: torch.Tensor
    figures: dict[str, torch.Tensor]
    votes: torch.Tensor | None = None


class TrainingStep:
    """Forward and backward pass over a global batch, gradient clipping and AdamW.

    The gradients are those of the whole batch's loss, however it is divided. A loss that compares crystals is
    computed from the embeddings of all ranks and chunks, and each chunk continues backward from its rows of
    the gradient; where there are several chunks, each is passed forward twice (Gao et al., arXiv 2101.06983).

    Args:
        task: what is trained.
        weight_decay: AdamW's decoupled weight decay.
        grad_clip: largest norm of the whole gradient; None does not clip.
        ranks: of the run; None for a single one.
        statistics: "global": every BatchNorm sees the global batch, whatever its division, which costs one
            small exchange a norm and direction between ranks, and repeated passes over chunks
            (`kernels.statistics.ChunkStatistics`); "local": each chunk by itself.
    """

    def __init__(
        self,
        task: StepTask,
        weight_decay: float = 0.01,
        grad_clip: float | None = None,
        *,
        ranks: Ranks | None = None,
        statistics: Literal["global", "local"] = "global",
    ):
        self.task = task
        self.ranks = ranks or Ranks()
        self.statistics = statistics
        self.parameters = list(task.model.parameters())
        self.max_norm = math.inf if grad_clip is None else grad_clip
        self.optimizer = self._adamw(weight_decay)

    def gradients(self, batch: Batch, votes: Sequence[float] = ()) -> StepResult:
        """Compute the clipped gradients of a batch; the weights stay as they are.

        Args:
            batch: this rank's share.
            votes: numbers to be added up over the ranks along with the gradients, at no cost of their own.
        """
        self.task.model.recompute = batch.recompute
        if not batch.chunked:
            with self._rank_statistics():
                losses = self._whole(batch)
        elif self.statistics == "global":
            losses = self._chunks_of_one_batch(batch)
        else:
            losses = self._separate_chunks(batch)
        return self._reduced(losses, votes)

    def update(self, lr: float):
        """Move the weights by the gradients computed last."""
        with span("optimiser"):
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()

    def _adamw(self, weight_decay: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.parameters, weight_decay=weight_decay, fused=True)

    @contextmanager
    def _rank_statistics(self) -> Iterator[None]:
        if self.ranks.size == 1 or self.statistics == "local":
            yield
            return
        set_statistics(self.task.model, RankStatistics(self.ranks.group))
        try:
            yield
        finally:
            set_statistics(self.task.model, None)

    def _whole(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Pass a share forward and backward at once; return the loss and figures of this rank."""
        self.optimizer.zero_grad()
        (chunk,) = batch.chunks
        found = self.task.forward(batch, chunk)
        joint = _joint(self.task, self.ranks, batch, [found.embeddings])
        self._backward(found, chunk, joint)
        return _losses([found], joint)

    def _chunks_of_one_batch(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Pass chunks forward and backward until their norms know the whole batch."""
        with ChunkStatistics(self.task.model, self.ranks.group) as statistics:
            with torch.no_grad():
                for _ in statistics.forward_sweeps():
                    found = [self.task.forward(batch, chunk) for chunk in batch.chunks]
            joint = _joint(self.task, self.ranks, batch, [one.embeddings for one in found])
            for _ in statistics.backward_sweeps():
                self.optimizer.zero_grad()
                for chunk in batch.chunks:
                    self._backward(self.task.forward(batch, chunk), chunk, joint)
        return _losses(found, joint)

    def _separate_chunks(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Pass chunks forward and backward one by one, with statistics of their own."""
        joint = None
        if self.task.compares_crystals:
            buffers = [buffer.clone() for buffer in self.task.model.buffers()]
            with torch.no_grad():
                embeddings = [self.task.forward(batch, chunk).embeddings for chunk in batch.chunks]
                for buffer, before in zip(self.task.model.buffers(), buffers, strict=True):
                    buffer.copy_(before)  # running statistics move in the second pass
            joint = _joint(self.task, self.ranks, batch, embeddings)
        self.optimizer.zero_grad()
        found = []
        for chunk in batch.chunks:
            one = self.task.forward(batch, chunk)
            self._backward(one, chunk, joint)
            found.append(ChunkLoss(one.loss.detach(), one.figures))
        return _losses(found, joint)

    def _backward(self, found: ChunkLoss, chunk: Chunk, joint: JointLoss | None) -> None:
        loss = found.loss
        if joint is not None:
            loss = loss + (found.embeddings * joint.gradient[:, chunk.places]).sum()
        with span("backward"):
            loss.backward()

    def _reduced(self, losses: dict[str, torch.Tensor], votes: Sequence[float] = ()) -> StepResult:
        """Add up gradients, figures and votes over the ranks, in one exchange, and clip."""
        counted = None
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if self.ranks.size > 1:
            # Running statistics of each rank's own rows would drift apart: all go on from their average.
            running = [value.div_(self.ranks.size) for value in self._separate_running_statistics()]
            summed = gradients + running
            values = torch.stack([value.reshape(()).to(gradients[0].dtype) for value in losses.values()])
            flat = torch.cat([tensor.flatten() for tensor in summed] + [values, values.new_tensor(votes)])
            self.ranks.sum_(flat)
            *parts, values, counted = flat.split(
                [tensor.numel() for tensor in summed] + [len(values), len(votes)]
            )
            for tensor, total in zip(summed, parts, strict=True):
                tensor.copy_(total.view_as(tensor))
            losses = dict(zip(losses, values, strict=True))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        return StepResult(losses.pop("loss"), norm, losses, counted)

    def _separate_running_statistics(self) -> list[torch.Tensor]:
        """Return the running statistics that each rank moves by its own rows."""
        if self.statistics == "global":
            return []
        return [
            value for norm in norms_of(self.task.model) for value in (norm.running_mean, norm.running_var)
        ]


@torch.no_grad()
def batch_losses(task: StepTask, ranks: Ranks, batch: Batch) -> dict[str, float]:
    """Return "loss" and figures of a global batch, the same on every rank; nothing is learnt."""
    found = [task.forward(batch, chunk) for chunk in batch.chunks]
    joint = _joint(task, ranks, batch, [one.embeddings for one in found], gradient=False)
    losses = _losses(found, joint)
    values = torch.stack([value.double().reshape(()) for value in losses.values()])
    return dict(zip(losses, ranks.sum_(values).tolist(), strict=True))


def _joint(
    task: StepTask,
    ranks: Ranks,
    batch: Batch,
    embeddings: list[torch.Tensor | None],
    gradient: bool = True,
) -> JointLoss | None:
    """Compare the crystals of all chunks and ranks."""
    if not task.compares_crystals:
        return None
    own = torch.cat([one.detach() for one in embeddings], dim=1)
    everywhere = own.new_zeros(2, batch.size, own.shape[2])
    everywhere[:, torch.cat([chunk.places for chunk in batch.chunks])] = own
    joint = task.joint_loss(ranks.sum_(everywhere), ranks, gradient)  # each row is nonzero on one rank alone
    return replace(joint, gradient=ranks.sum_(joint.gradient)) if gradient else joint


def _losses(found: list[ChunkLoss], joint: JointLoss | None) -> dict[str, torch.Tensor]:
    """Add up loss and figures of this rank's chunks, and its share of what is joint."""
    sums = {"loss": sum(one.loss.detach() for one in found)}
    for name in found[0].figures:
        sums[name] = sum(one.figures[name] for one in found)
    if joint is not None:
        sums["loss"] = sums["loss"] + joint.loss
        sums |= joint.figures
    return sums
