"""Which crystals a step works on, on which rank, in which pieces: a function of seed, epoch and step alone.

A *global batch* holds the crystals of one step, exactly as many as configured. Each rank gets a *share* of
equal cost. A share whose training step does not fit the memory budget is worked on with layers computed again
in the backward pass, or, if that does not help enough, in *chunks*, one after the other. All ranks make the
same plan from the stored counts of edges, so they take the same path without asking one another.
"""

from __future__ import annotations

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
        part: what the crystals are, for messages.

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
        part: str = "training part",
    ):
        self.crystals, self.edges = crystals, np.asarray(edges)
        self.batch_size, self.num_ranks, self.seed = batch_size, num_ranks, seed
        self.smallest, self.budget = smallest, budget
        bounds = batch_bounds(len(crystals), batch_size, smallest)
        self.num_batches = len(bounds) - 1
        self.largest_batch = int(np.diff(bounds).max())
        self._bounds = bounds
        few = int(np.diff(bounds).min())
        if few < num_ranks:
            raise ValueError(
                f"the {part} has {len(crystals)} crystals; in batches of at most {batch_size} some batch has "
                f"{few}, and {num_ranks} ranks need a crystal each; start fewer ranks"
            )
        if budget is not None and len(crystals):
            largest = int(np.argmax(self.edges))
            if self.edges[largest] > max(budget.edges, budget.recomputed_edges):
                place = int(crystals[largest])
                name = f"{names[place]!r}" if names is not None else f"at position {place}"
                need = self.edges[largest] * min(budget.bytes_per_edge, budget.recomputed_bytes_per_edge)
                need /= 2**30
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
        edges = self.edges[places].astype(np.int64)
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
    part, loads = _assign(edges, num_ranks)
    largest = int(loads.max())
    if budget is not None and largest > max(budget.edges, budget.recomputed_edges):
        # A crystal that fits only if its layers are computed again decides for all chunks.
        recompute = int(edges.max()) > budget.edges
        limit = budget.recomputed_edges if recompute else budget.edges
        return _chunks(edges, num_ranks, limit), recompute
    recompute = budget is not None and largest > budget.edges
    return tuple((share,) for share in _members(part, num_ranks)), recompute


def balance(costs: np.ndarray, parts: int) -> list[np.ndarray]:
    """Divide items into parts of nearly equal cost: the dearest first, each to the cheapest part.

    Items of about equal cost are dealt at once, as if they cost alike. No part costs more than 4/3 of
    the mean and two items; real crystals come within a few thousandths of dealing them one by one. Whole
    numbers and stable sorts alone decide, so that all machines divide alike.

    Args:
        costs: of each item, (n,) whole numbers; none counts for less than 1.
        parts: how many; none stays empty if there are as many items.

    Returns:
        The items of each part, ascending.

    Source: Graham 1969, longest processing time first.
    """
    return _members(_assign(costs, parts)[0], parts)


def _assign(costs: np.ndarray, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the part of each item, (n,), and what each part costs, (parts,); see `balance`."""
    costs = np.maximum(np.asarray(costs, np.int64), 1)
    order = _stable_order(costs.max(initial=1) - costs)
    falling = costs[order]
    rising = -falling
    dealt, loads = np.zeros(len(costs), np.int64), np.zeros(parts, np.int64)
    start = 0
    while parts > 1 and start < len(costs):
        dearest = int(falling[start])
        alike = int(np.searchsorted(rising, -(dearest * 3 // 4), side="right"))
        half = start + (len(costs) - start + 1) // 2  # the cheaper ones make up for what this deal leaves
        stop = min(max(min(alike, half), start + parts), len(costs))
        dealt[start:stop] = _cheapest(loads, dearest, stop - start)
        np.add.at(loads, dealt[start:stop], falling[start:stop])
        start = stop
    part = np.empty_like(dealt)
    part[order] = dealt
    return part, loads if parts > 1 else falling.sum(keepdims=True)


def _cheapest(loads: np.ndarray, cost: int, count: int) -> np.ndarray:
    """Return to which parts so many items of one cost go, one after the other to the cheapest, (count,).

    A part takes them at the heights load, load + cost, load + 2 cost ...: the lowest heights of all parts
    are sought, and these lie below the level to which as much water would rise.
    """
    rising = np.sort(loads)
    below = np.cumsum(rising)
    volume = np.arange(1, len(loads) + 1) * rising - below  # of water up to each load
    wet = int(np.searchsorted(volume, count * cost))
    level = -(-(count * cost + below[wet - 1]) // wet)
    room = np.maximum(-(-(level - loads) // cost), 0)
    part = np.repeat(np.arange(len(loads)), room)
    number = np.arange(len(part)) - np.repeat(np.cumsum(room) - room, room)
    return part[np.argsort(loads[part] + number * cost, kind="stable")[:count]]


def _members(part: np.ndarray, parts: int) -> list[np.ndarray]:
    """Return the items of each part, ascending."""
    bounds = np.cumsum(np.bincount(part, minlength=parts))[:-1]
    return np.split(_stable_order(part), bounds)


def _stable_order(keys: np.ndarray) -> np.ndarray:
    """Sort small whole numbers: below 2^16 by radix, in a tenth of the time."""
    return np.argsort(keys.astype(np.min_scalar_type(keys.max(initial=0))), kind="stable")


def _chunks(edges: np.ndarray, num_ranks: int, limit: int) -> tuple[tuple[np.ndarray, ...], ...]:
    """Divide a batch into few chunks of at most `limit` edges, and these among ranks.

    No crystal has more edges by itself, and there are as many crystals as ranks.
    """
    count = max(-(-int(edges.sum()) // limit), num_ranks)
    while True:
        part, loads = _assign(edges, count)
        if loads.max() <= limit:
            break
        count += max(count // 16, 1)
    chunks = _members(part, count)
    return tuple(tuple(chunks[i] for i in share if len(chunks[i])) for share in balance(loads, num_ranks))
