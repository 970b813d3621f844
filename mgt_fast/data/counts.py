"""How many edges the graph of each crystal has: what a crystal costs, known before its graph is built.

`mgt-fast prepare` counts them for its `--max-neighbors` (25 unless told otherwise) and stores them in the
dataset as `edges-<max_neighbors>.arrow`, one column `num_edges` (int32) in the order of the crystals, hashed
in the manifest. A file of its own, and no column of the shards, because

- a run reads the counts of all crystals at once, before any crystal: 4 bytes a crystal in one piece;
- counts depend on a choice (max_neighbors), crystals do not: counts for another choice are another file, and
  the shards, their hashes and datasets of version 1 stay as they are.

What is not stored, and graphs of `compat="comformer"`, are counted when asked for, on all cores.

A crystal may have no graph for some max_neighbors: a molecule without periodicity has no 25 neighbours if it
has 25 atoms. It is stored nevertheless, since it has graphs for fewer. Its count is null in the file and 0
here, `prepare` says how many there are, and `require_graphs` lets a run refuse them at its start, by name.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import Progress

from ..graph import SHELL_TOLERANCE, build_graph, neighbor_list
from ..structures import CrystalBatch
from .store import CrystalDataset

PIECE_ATOMS = 2**14  # atoms whose graphs are in memory at a time: about 50 MB at 25 neighbours
PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal


def edge_counts(
    dataset: CrystalDataset, max_neighbors: int, compat: str | None = None, console: Console | None = None
) -> np.ndarray:
    """Return how many edges `build_graph` finds in each crystal, (n,) int64; 0 where there is no graph.

    They are read from the dataset if it holds them, else counted.

    Args:
        dataset: n crystals.
        max_neighbors, compat: of the graphs; see `build_graph`.
        console: where to show progress; nowhere when absent.

    Raises:
        ValueError: for wrong arguments, as `build_graph`.
    """
    if compat is None:
        stored = dataset.stored_edge_counts(max_neighbors, SHELL_TOLERANCE)
        if stored is not None:
            return stored.astype(np.int64)
    return count_edges(dataset, max_neighbors, compat, console)


def count_edges(
    dataset: CrystalDataset, max_neighbors: int, compat: str | None = None, console: Console | None = None
) -> np.ndarray:
    """Count what `edge_counts` returns, whatever is stored; on all cores, in pieces of bounded memory."""
    _edges_of(_EMPTY, max_neighbors, compat)  # wrong arguments are no fault of the first crystal
    counts = np.zeros(len(dataset), np.int64)
    with _progress(console, len(dataset)) as advance:
        for start, stop in _pieces(dataset.num_atoms):
            _count_into(counts[start:stop], dataset, np.arange(start, stop), max_neighbors, compat)
            advance(stop - start)
    return counts


def require_graphs(
    dataset: CrystalDataset,
    counts: np.ndarray,
    indices: np.ndarray,
    max_neighbors: int,
    compat: str | None = None,
) -> None:
    """Raise ValueError if one of the crystals `indices` has no graph, naming the first and saying why."""
    missing = np.asarray(indices)[counts[indices] == 0]
    if not len(missing):
        return
    try:
        build_graph(dataset.gather(missing[:1]), max_neighbors, compat)
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
    ends = np.cumsum(num_atoms)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + PIECE_ATOMS, side="right")))
        yield start, stop
        start = stop


def _count_into(
    counts: np.ndarray, dataset: CrystalDataset, indices: np.ndarray, max_neighbors: int, compat: str | None
) -> None:
    """Count the edges of consecutive crystals; where one has no graph, halve until it stands alone."""
    try:
        counts[:] = _edges_of(dataset.gather(indices), max_neighbors, compat)
    except ValueError:
        if len(indices) == 1:
            return
        middle = len(indices) // 2
        for part in (slice(None, middle), slice(middle, None)):
            _count_into(counts[part], dataset, indices[part], max_neighbors, compat)


def _edges_of(crystals: CrystalBatch, max_neighbors: int, compat: str | None) -> np.ndarray:
    threads = len(os.sched_getaffinity(0))
    if compat is None:
        row_ptr = neighbor_list(crystals, max_neighbors=max_neighbors, threads=threads).row_ptr
    else:
        row_ptr = build_graph(crystals, max_neighbors, compat, threads=threads).row_ptr
    return row_ptr[crystals.batch_ptr].diff().numpy()


@contextmanager
def _progress(console: Console | None, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many crystals are counted: a bar on a terminal, else a line now and then."""
    if console is None:
        yield lambda done: None
    elif console.is_terminal:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("counting edges", total=total)
            yield lambda done: progress.advance(task, done)
    else:
        counted, last = 0, time.monotonic()

        def advance(done: int) -> None:
            nonlocal counted, last
            counted += done
            if time.monotonic() - last >= PLAIN_INTERVAL:
                console.print(f"edges counted of {counted} of {total} crystals")
                last = time.monotonic()

        yield advance
