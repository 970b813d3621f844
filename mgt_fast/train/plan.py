"""Which crystals a step works on, on which rank, in which pieces: a function of seed, epoch and step alone.

A *global batch* holds the crystals of one step, exactly as many as configured. Each rank gets a *share* of
equal cost. A share whose training step does not fit the memory budget is worked on with layers computed again
in the backward pass, or, if that does not help enough, in *chunks*, one after the other. All ranks make the
same plan from the stored counts of edges, so they take the same path without asking one another.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..data.sampling import permuted
from ..kernels.random import stream_key

ORDER = 1  # purpose of the stream that decides the order of crystals


class MemoryBudgetError(ValueError):
    """A crystal that does not fit the memory budget; the message names it."""


@dataclass(frozen=True)
class MemoryBudget:
    """Memory of a training step on one rank.

    Attributes:
        limit: bytes that a step may take beside network, optimiser and data.
        bytes_per_edge: that it takes (see `mgt_fast.memory`).
        recomputed_bytes_per_edge: that it takes with layers computed again.
    """

    limit: float
    bytes_per_edge: float
    recomputed_bytes_per_edge: float

    @property
    def edges(self) -> int:
        """Edges that fit."""
        return int(self.limit / self.bytes_per_edge)

    @property
    def recomputed_edges(self) -> int:
        """Edges that fit with layers computed again."""
        return int(self.limit / self.recomputed_bytes_per_edge)


@dataclass(frozen=True)
class Split:
    """A global batch, and how the ranks divide it.

    Attributes:
        epoch, number: epoch from 1, batch in it from 0.
        crystals: positions in the dataset, (B,) int64.
        edges: number of edges of each, (B,) int64.
        shares: for each rank its chunks, each the ascending places of its crystals among the B.
        recompute: whether layers are computed again in the backward pass.
    """

    epoch: int
    number: int
    crystals: np.ndarray
    edges: np.ndarray
    shares: tuple[tuple[np.ndarray, ...], ...]
    recompute: bool

    @property
    def chunked(self) -> bool:
        """Whether any rank works in several chunks, which decides the path that all take."""
        return any(len(share) > 1 for share in self.shares)


class BatchPlan:
    """The batches of a run.

    Args:
        crystals: positions in the dataset, (n,) int64.
        edges: number of edges of each of them, (n,).
        batch_size: crystals of a global batch, at most (see `batch_bounds`).
        num_ranks: how many ranks divide it.
        seed: shuffles anew each epoch; None keeps the order.
        smallest: of a batch; see `batch_bounds`.
        budget: None if memory does not matter.
        names: of the crystals, for messages; indexed by position in the dataset.

    Raises:
        MemoryBudgetError: if a crystal exceeds the budget by itself.
        ValueError: if some batch would have fewer crystals than there are ranks.
    """

    def __init__(
        self,
        crystals: np.ndarray,
        edges: np.ndarray,
        batch_size: int,
        *,
        num_ranks: int = 1,
        seed: int | None = None,
        smallest: int = 1,
        budget: MemoryBudget | None = None,
        names: Sequence[str] | None = None,
    ):
        self.crystals, self.edges = crystals, np.asarray(edges, np.int64)
        self.batch_size, self.num_ranks, self.seed = batch_size, num_ranks, seed
        self.smallest, self.budget = smallest, budget
        bounds = batch_bounds(len(crystals), batch_size, smallest)
        self.num_batches = len(bounds) - 1
        self.largest_batch = int(np.diff(bounds).max())
        self._bounds = bounds
        few = int(np.diff(bounds).min())
        if few < num_ranks:
            raise ValueError(
                f"{len(crystals)} crystals in batches of at most {batch_size} make a batch of {few}, and "
                f"{num_ranks} ranks need a crystal each; start fewer ranks or set a larger optim.batch_size"
            )
        if budget is not None and len(crystals):
            largest = int(np.argmax(self.edges))
            if self.edges[largest] > budget.edges:
                place = int(crystals[largest])
                name = f"{names[place]!r}" if names is not None else f"at position {place}"
                need = self.edges[largest] * budget.bytes_per_edge / 2**30
                raise MemoryBudgetError(
                    f"crystal {name} has {self.edges[largest]} edges, a step with it alone takes about "
                    f"{need:.3g} GiB and the budget is {budget.limit / 2**30:.3g} GiB; set a larger "
                    "memory_gib, a smaller data.max_neighbors, or leave the crystal out"
                )

    def batch(self, epoch: int, number: int) -> Split:
        """Return a batch: `epoch` from 1, `number` from 0."""
        places = np.arange(self._bounds[number], self._bounds[number + 1])
        if self.seed is not None:
            places = permuted(places, len(self.crystals), stream_key(self.seed, ORDER, epoch))
        edges = self.edges[places]
        shares, recompute = split_batch(edges, self.num_ranks, self.budget)
        return Split(epoch, number, self.crystals[places], edges, shares, recompute)


def batch_bounds(n: int, batch_size: int, smallest: int = 1) -> np.ndarray:
    """Return where batches begin and end whose sizes differ by at most one, so that no batch is a small rest.

    Args:
        n: samples.
        batch_size: largest batch.
        smallest: no batch is smaller than this (batch normalisation cannot learn from one row), even if one
            must then hold one sample more than `batch_size`; it matters for odd n and batches of two alone.

    Returns:
        First sample of each batch, and n, int64.
    """
    n_batches = max(1, min(-(-n // batch_size), n // smallest))
    small, larger = divmod(n, n_batches)
    number = np.arange(n_batches + 1)
    return number * small + np.minimum(number, larger)


def split_batch(
    edges: np.ndarray, num_ranks: int, budget: MemoryBudget | None
) -> tuple[tuple[tuple[np.ndarray, ...], ...], bool]:
    """Divide a batch of crystals with so many edges, (B,), among ranks and, where it must be, into chunks.

    Returns:
        The chunks of each rank (see `Split`), and whether layers are to be computed again.
    """
    shares = balance(edges, num_ranks)
    largest = max(int(edges[share].sum()) for share in shares)
    if budget is None or largest <= budget.edges:
        return tuple((share,) for share in shares), False
    if largest <= budget.recomputed_edges:
        return tuple((share,) for share in shares), True
    return tuple(_chunks(share, edges[share], budget.edges) for share in shares), False


def balance(costs: np.ndarray, parts: int) -> list[np.ndarray]:
    """Divide items into so many parts of nearly equal cost: the dearest first, each to the cheapest part.

    Args:
        costs: of each item, (n,).
        parts: how many; none stays empty if there are as many items.

    Returns:
        The items of each part, ascending.

    Source: Graham 1969, longest processing time first; no part costs more than 4/3 of the best division's.
    """
    if parts == 1:
        return [np.arange(len(costs))]
    loads = [(0, 0, part) for part in range(parts)]  # cost, number of items, part
    members: list[list[int]] = [[] for _ in range(parts)]
    for item in np.argsort(-np.asarray(costs), kind="stable").tolist():
        load, count, part = heapq.heappop(loads)
        members[part].append(item)
        heapq.heappush(loads, (load + int(costs[item]), count + 1, part))
    return [np.array(sorted(items), np.int64) for items in members]


def _chunks(places: np.ndarray, edges: np.ndarray, limit: int) -> tuple[np.ndarray, ...]:
    """Divide a share into few chunks of at most `limit` edges; no crystal has more by itself."""
    count = max(-(-int(edges.sum()) // limit), 1)
    while True:
        chunks = balance(edges, count)
        if max(int(edges[chunk].sum()) for chunk in chunks) <= limit:
            return tuple(places[chunk] for chunk in chunks if len(chunk))
        count += 1
