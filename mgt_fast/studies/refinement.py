"""What distances alone tell: the baselines that any network of distances can at most reach on its graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from ..graph import build_graph, neighbor_list
from ..structures import CrystalBatch

SAME_DISTANCE = 1e-8
"""Relative difference up to which distances count as equal; shells are 1e-4 wide, rounding is 1e-15."""


def pair_distances_separate(crystals: CrystalBatch, cutoff: float) -> bool:
    """Whether the radial distribution functions of two crystals differ.

    That is the multiset of distances of all pairs of atoms (by element) up to a cutoff, per atom.

    Args:
        crystals: two.
        cutoff: Å.
    """
    neighbors = neighbor_list(crystals, cutoff=cutoff * (1 + SAME_DISTANCE))
    labels = distance_labels(np.linalg.norm(neighbors.edge_vec.numpy(), axis=1))
    numbers = crystals.numbers.numpy()
    source, target = neighbors.edge_index.numpy()
    pairs = list(zip(numbers[source].tolist(), numbers[target].tolist(), labels.tolist(), strict=True))
    return _differ(pairs, int(neighbors.row_ptr[crystals.batch_ptr[1]]), crystals.num_atoms.tolist())


def refinement_separates(crystals: CrystalBatch, max_neighbors: int, rounds: int | None = None) -> bool:
    """Whether colour refinement with distances (1-WL) tells two crystals' graphs apart.

    Atoms begin with their element as colour; in each round an atom's new colour is its old one together with
    the multiset of (distance, colour) of its neighbours. No message passing network of elements and distances
    on this graph tells apart what this does not.

    Args:
        crystals: two.
        max_neighbors: of the graphs.
        rounds: of refinement; 1 compares each atom's list of distances, None goes on until nothing changes.
    """
    graph = build_graph(crystals, max_neighbors)
    labels = distance_labels(np.linalg.norm(graph.edge_vec.numpy(), axis=1)).tolist()
    targets, ptr = graph.edge_index[1].tolist(), graph.row_ptr.tolist()
    colors, classes, done = _renumbered(graph.numbers.tolist()), 0, 0
    while len(set(colors)) > classes and done != rounds:
        classes = len(set(colors))
        around = [
            tuple(sorted((labels[e], colors[targets[e]]) for e in range(ptr[i], ptr[i + 1])))
            for i in range(graph.num_atoms)
        ]
        colors = _renumbered(list(zip(colors, around, strict=True)))
        done += 1
    return _differ(colors, int(crystals.batch_ptr[1]), crystals.num_atoms.tolist())


def distance_labels(distances: np.ndarray) -> np.ndarray:
    """Number distances such that equal ones have equal numbers, (n,) → (n,) int."""
    order = np.argsort(distances)
    ordered = distances[order]
    label = np.zeros(len(distances), dtype=np.int64)
    label[order[1:]] = np.cumsum(np.diff(ordered) > SAME_DISTANCE * ordered[1:])
    return label


def _renumbered(values: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def _differ(values: Sequence[Hashable], first: int, num_atoms: Sequence[int]) -> bool:
    """Whether two multisets differ: the `first` values and the rest, each per atom of its crystal."""
    one, other = Counter(values[:first]), Counter(values[first:])
    return {value: count * num_atoms[1] for value, count in one.items()} != {
        value: count * num_atoms[0] for value, count in other.items()
    }
