"""How many edges the graph of each crystal has: what a crystal costs, known before its graph is built.

`mgt-fast prepare` counts them for its `--max-neighbors` (25 unless told otherwise) and stores them in the
dataset as `edges-<max_neighbors>.arrow`, one column `num_edges` (int32) in the order of the crystals, hashed
in the manifest. A file of its own, and no column of the shards, because

- a run reads the counts of all crystals at once, before any crystal: 4 bytes a crystal in one piece;
- counts depend on a choice (max_neighbors), crystals do not: counts for another choice are another file, and
  the shards, their hashes and datasets of version 1 stay as they are.

What is not stored, and graphs of `compat="comformer"`, are counted when asked for: on all cores, and where a
run has several ranks, each crystal by one of them.

A crystal may have no graph for some max_neighbors: a molecule without periodicity has no 25 neighbours if it
has 25 atoms. It is stored nevertheless, since it has graphs for fewer. Its count is null in the file and 0
here, `prepare` says how many there are, and `require_graphs` lets a run refuse them at its start, by name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from ..distributed import Ranks
from ..graph import SHELL_TOLERANCE, build_graph, neighbor_list
from ..structures import CrystalBatch
from .store import CrystalDataset

PIECE_ATOMS = 2**14  # atoms whose graphs are in memory at a time: about 50 MB at 25 neighbours
PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal


def edge_counts(
    dataset: CrystalDataset,
    max_neighbors: int,
    compat: str | None = None,
    console: Console | None = None,
    *,
    shell_tolerance: float = SHELL_TOLERANCE,
    indices: np.ndarray | None = None,
    ranks: Ranks | None = None,
) -> np.ndarray:
    """Return how many edges `build_graph` finds in each crystal, (n,) int32; 0 where there is no graph.

    They are read from the dataset if it holds them, not to be written to; else they are counted.

    Args:
        dataset: n crystals.
        max_neighbors, compat, shell_tolerance: of the graphs; see `build_graph`.
        console: where to show progress; nowhere when absent.
        indices: positions of crystals, (k,) int64: others need not be counted and may be 0. None for all.
        ranks: that divide the counting and all get the result; all must call this. None for a single one.

    Raises:
        RankError: if another rank failed.
        ValueError: for wrong arguments, as `build_graph`.
    """
    if compat is None:
        stored = dataset.stored_edge_counts(max_neighbors, shell_tolerance)
        if stored is not None:
            return stored
    ranks = ranks or Ranks.alone()
    with ranks.together():
        counts = count_edges(
            dataset,
            max_neighbors,
            compat,
            console,
            shell_tolerance=shell_tolerance,
            indices=indices,
            share=(ranks.rank, ranks.size),
        )
    counts = ranks.sum_(torch.from_numpy(counts)).numpy()
    if indices is None:
        return counts
    edges = np.zeros(len(dataset), np.int32)
    edges[indices] = counts
    return edges


def count_edges(
    dataset: CrystalDataset,
    max_neighbors: int,
    compat: str | None = None,
    console: Console | None = None,
    *,
    shell_tolerance: float = SHELL_TOLERANCE,
    indices: np.ndarray | None = None,
    share: tuple[int, int] = (0, 1),
) -> np.ndarray:
    """Count edges, whatever is stored; on all cores, in pieces of bounded memory.

    Args:
        dataset, max_neighbors, compat, console, shell_tolerance: as for `edge_counts`.
        indices: positions of the crystals to count, (k,) int64; None for all.
        share: (i, m) counts only the i-th of m shares, which have about as many atoms.

    Returns:
        Edges of each of these crystals, (k,) int32; 0 where there is no graph, and in other shares.
    """
    kind = (max_neighbors, compat, shell_tolerance)
    _edges_of(_EMPTY, *kind)  # wrong arguments are no fault of the first crystal
    num_atoms = dataset.num_atoms if indices is None else dataset.num_atoms[indices]
    counts = np.zeros(len(num_atoms), np.int32)
    with _progress(console, len(counts)) as reached:
        # Shares keep pace with one another, so that where one is, all are.
        for start, stop in islice(_pieces(num_atoms), share[0], None, share[1]):
            chosen = np.arange(start, stop) if indices is None else indices[start:stop]
            _count_into(counts[start:stop], dataset, chosen, kind)
            reached(stop)
    return counts


def require_graphs(
    dataset: CrystalDataset,
    counts: np.ndarray,
    indices: np.ndarray,
    max_neighbors: int,
    compat: str | None = None,
    shell_tolerance: float = SHELL_TOLERANCE,
) -> None:
    """Raise ValueError if one of the crystals `indices` has no graph, naming the first and saying why."""
    missing = np.asarray(indices)[counts[indices] == 0]
    if not len(missing):
        return
    try:
        build_graph(dataset.gather(missing[:1]), max_neighbors, compat, shell_tolerance=shell_tolerance)
    except ValueError as error:
        raise ValueError(
            f"{len(missing)} of {len(indices)} crystals have no graph with max_neighbors = {max_neighbors}; "
            f"the first: {error}. Choose a smaller max_neighbors or leave them out"
        ) from error
    raise ValueError(
        f"{dataset.path}: the count of edges of {dataset.ids[missing[0]]!r} is missing, though it has a "
        "graph; prepare the dataset again"
    )


_EMPTY = CrystalBatch.from_arrays([], np.empty((0, 3)), np.empty((0, 3, 3)), [])


def _pieces(num_atoms: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield ranges of crystals with PIECE_ATOMS atoms at most, or of one crystal."""
    start = 0
    while start < len(num_atoms):
        ends = np.cumsum(num_atoms[start : start + PIECE_ATOMS])  # a crystal has an atom at least
        stop = start + max(1, int(np.searchsorted(ends, PIECE_ATOMS, side="right")))
        yield start, stop
        start = stop


def _count_into(
    counts: np.ndarray,
    dataset: CrystalDataset,
    indices: np.ndarray,
    kind: tuple[int, str | None, float],
) -> None:
    """Count the edges of consecutive crystals; where one has no graph, halve until it stands alone."""
    try:
        counts[:] = _edges_of(dataset.gather(indices), *kind)
    except ValueError:
        if len(indices) == 1:
            return
        middle = len(indices) // 2
        for part in (slice(None, middle), slice(middle, None)):
            _count_into(counts[part], dataset, indices[part], kind)


def _edges_of(
    crystals: CrystalBatch, max_neighbors: int, compat: str | None, shell_tolerance: float
) -> np.ndarray:
    threads = max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    if compat is None:
        options = {"max_neighbors": max_neighbors, "shell_tolerance": shell_tolerance}
        row_ptr = neighbor_list(crystals, **options, threads=threads).row_ptr
    else:
        row_ptr = build_graph(
            crystals, max_neighbors, compat, shell_tolerance=shell_tolerance, threads=threads
        ).row_ptr
    return row_ptr[crystals.batch_ptr].diff().numpy()


@contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many crystals are counted: a bar on a terminal, else a line now and then."""
    if console is None:
        yield lambda counted: None
    elif console.is_terminal:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("counting edges", total=total)
            yield lambda counted: progress.update(task, completed=counted)
    else:
        last = time.monotonic()

        def reached(counted: int) -> None:
            nonlocal last
            if time.monotonic() - last >= PLAIN_INTERVAL:
                console.print(f"edges counted of {counted} of {total} crystals")
                last = time.monotonic()

        yield reached
