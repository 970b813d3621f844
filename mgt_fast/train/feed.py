"""From a plan to batches of graphs on the device, ahead of the step that needs them.

On a CPU graphs are built when they are asked for. For a CUDA device there are two ways: crystals that live in
device memory are gathered and turned into graphs there, and the host only says which; others are gathered on
the host by a thread of its own, some batches ahead, into pinned memory from which copies do not wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from ..data import CrystalDataset
from ..data.resident import ResidentCrystals
from ..distributed import Ranks
from ..graph import SHELL_TOLERANCE, CrystalGraph, network_input
from ..kernels.random import fork_keys, stream_key
from ..profiling import span
from ..structures import CrystalBatch
from .plan import BatchPlan, Split
from .step import Batch, Chunk

AHEAD = 3
"""Batches that are gathered on the host before they are needed."""


@dataclass(frozen=True)
class GraphSource:
    """Builds the graphs of chosen crystals of a dataset for a network on `device`, in float32.

    Attributes:
        dataset: the crystals.
        max_neighbors, compat: see `graph.build_graph`.
        device: of the network.
        resident: the same crystals in the device's memory, if they are held there.
        shell_tolerance: see `graph.build_graph`.
    """

    dataset: CrystalDataset
    max_neighbors: int
    compat: str | None
    device: torch.device
    resident: ResidentCrystals | None = None
    shell_tolerance: float = SHELL_TOLERANCE

    @property
    def resident_bytes(self) -> int:
        """Device memory that the crystals take."""
        return 0 if self.resident is None else self.resident.nbytes_held

    def gather(self, indices: np.ndarray) -> CrystalBatch:
        """Return the crystals `indices`, on the device if they live there, otherwise on their way to it."""
        if self.resident is not None:
            return self.resident.gather(indices)
        crystals = self.dataset.gather(indices)
        return crystals.pin_memory() if self.device.type == "cuda" else crystals

    def build(self, crystals: CrystalBatch, num_edges: int | None = None) -> CrystalGraph:
        """Return the graphs of gathered crystals as one batch; see `graph.network_input`."""
        with span("neighbours"):
            return network_input(
                crystals,
                self.device,
                max_neighbors=self.max_neighbors,
                compat=self.compat,
                shell_tolerance=self.shell_tolerance,
                num_edges=num_edges,
            )

    def graph(self, indices: np.ndarray) -> CrystalGraph:
        """Gather crystals and build their graphs."""
        with span("data"):
            crystals = self.gather(indices)
        return self.build(crystals)


class BatchFeed:
    """This rank's share of planned batches, as graphs.

    Args:
        source: builds the graphs.
        plan: of all ranks.
        ranks: of the run.
        seed: of noise and dropout.
        purpose: keeps the noise of training and of validation apart.
    """

    def __init__(self, source: GraphSource, plan: BatchPlan, ranks: Ranks, seed: int, purpose: int):
        self.source, self.plan, self.ranks = source, plan, ranks
        self.seed, self.purpose = seed, purpose

    def batches(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from number `first` on."""
        splits = (self.plan.batch(epoch, number) for number in range(first, self.plan.num_batches))
        for split, gathered in self._gathered(splits):
            yield self._batch(split, gathered)

    def _gathered(self, splits: Iterable[Split]) -> Iterator[tuple[Split, list[CrystalBatch]]]:
        """Yield each split with the crystals of this rank's chunks."""
        if self.source.device.type != "cuda" or self.source.resident is not None:
            for split in splits:
                with span("data"):
                    gathered = self._gather(split)
                yield split, gathered
            return
        with ThreadPoolExecutor(1, thread_name_prefix="gather") as pool:
            waiting: deque = deque()
            for split in splits:
                waiting.append((split, pool.submit(self._gather, split)))
                if len(waiting) > AHEAD:
                    yield _awaited(*waiting.popleft())
            while waiting:
                yield _awaited(*waiting.popleft())

    def _gather(self, split: Split) -> list[CrystalBatch]:
        return [self.source.gather(split.crystals[chunk]) for chunk in split.shares[self.ranks.rank]]

    def _batch(self, split: Split, gathered: list[CrystalBatch]) -> Batch:
        key = stream_key(self.seed, self.purpose, split.epoch)
        chunks = []
        for places, crystals in zip(split.shares[self.ranks.rank], gathered, strict=True):
            chosen = split.crystals[places]
            device = self.source.device
            keys = torch.from_numpy(chosen).to(device, non_blocking=True)
            chunks.append(
                Chunk(
                    graph=self.source.build(crystals, int(split.edges[places].sum())),
                    crystals=chosen,
                    places=torch.from_numpy(places).to(device, non_blocking=True),
                    keys=fork_keys(keys, key),
                )
            )
        return Batch(
            epoch=split.epoch,
            number=split.number,
            size=len(split.crystals),
            num_edges=int(split.edges.sum()),
            chunks=tuple(chunks),
            chunked=split.chunked,
            recompute=split.recompute,
        )


def _awaited(split: Split, gathered: Future[list[CrystalBatch]]) -> tuple[Split, list[CrystalBatch]]:
    with span("data"):
        return split, gathered.result()
