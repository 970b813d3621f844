"""What both tasks share: batches from a plan, and who is to blame for a loss that is not finite."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..distributed import Ranks
from ..model import MGT
from .config import RunConfig
from .feed import BatchFeed, GraphSource
from .plan import BatchPlan
from .step import Batch, Chunk, batch_losses

TRAINING, VALIDATION = 2, 3  # purposes of the streams that decide noise and dropout; see also `plan.ORDER`


class GraphTask:
    """A task over the graphs of planned batches; `step.StepTask` says what a subclass adds.

    Args:
        model: the network.
        source: builds the graphs.
        plan: of the training batches.
        config: of the run.
        ranks: of the run; None for a single one.
    """

    compares_crystals = False

    def __init__(
        self, model: MGT, source: GraphSource, plan: BatchPlan, config: RunConfig, ranks: Ranks | None = None
    ):
        self.model, self.source, self.config = model, source, config
        self.ranks = ranks or Ranks()
        self.feed = BatchFeed(source, plan, self.ranks, config.seed, TRAINING)
        self.steps_per_epoch, self.largest_batch = plan.num_batches, plan.largest_batch

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield this rank's share of an epoch's batches, from number `first` on."""
        return self.feed.batches(epoch, first)

    @torch.no_grad()
    def suspects(self, batch: Batch) -> list[str]:
        """Name those of a share's crystals whose loss is not finite even if they are alone."""
        names = []
        self.model.train()
        for chunk in batch.chunks:
            for b, name in enumerate(chunk.graph.ids):
                only = slice(b, b + 1)
                graph = self.source.graph(chunk.crystals[only])
                keys = chunk.keys[only].to(self.source.device)
                alone = Chunk(graph, chunk.crystals[only], torch.zeros_like(keys), keys)
                share = Batch(batch.epoch, batch.number, 1, graph.num_edges, (alone,))
                if min(graph.num_atoms, graph.num_edges) < 2:
                    continue  # its statistics do not exist, which says nothing
                losses = batch_losses(self, Ranks.alone(), share)
                if not all(torch.as_tensor(value).isfinite() for value in losses.values()):
                    names.append(name)
        return names
