"""All pairs within a cutoff: ours beside pymatgen and vesin, on bundled Materials Project crystals.

Every rival must find the same pairs before it is timed. The peers are called crystal by crystal, as their
interfaces ask; pymatgen returns no vectors. Times are for the whole batch, on one thread.
"""

from __future__ import annotations

import numpy as np
import pytest
from pymatgen.optimization.neighbors import find_points_in_spheres
from vesin import NeighborList

from mgt_fast import build_graph, neighbor_list
from mgt_fast.data import CrystalDataset

NUM_CRYSTALS = 256


@pytest.fixture(scope="module")
def crystals():
    """Bundled crystals in a fixed random order."""
    dataset = CrystalDataset.open(None)
    return dataset.gather(np.random.default_rng(0).permutation(len(dataset))[:NUM_CRYSTALS])


def per_crystal(crystals):
    """Yield (fractional coordinates, cell) of each crystal."""
    for b in range(len(crystals)):
        atoms = slice(int(crystals.batch_ptr[b]), int(crystals.batch_ptr[b + 1]))
        yield crystals.frac_coords[atoms].numpy(), crystals.cell[b].numpy()


def ours(crystals, cutoff):
    """Return a function that finds the pairs, and one that takes the distances, Å, from what it found."""

    def find():
        return neighbor_list(crystals, cutoff=cutoff, threads=1)

    return find, lambda found: found.edge_vec.norm(dim=1).numpy()


def pymatgen(crystals, cutoff):
    """The same through pymatgen's compiled search."""
    periodic = np.array([1, 1, 1])
    inputs = [(np.ascontiguousarray(f @ c), np.ascontiguousarray(c)) for f, c in per_crystal(crystals)]

    def find():
        return [find_points_in_spheres(x, x, r=cutoff, pbc=periodic, lattice=c, tol=1e-8) for x, c in inputs]

    def distances(found):
        lengths = np.concatenate([f[3] for f in found])
        return lengths[lengths > 1e-8]  # each atom counts itself

    return find, distances


def vesin(crystals, cutoff):
    """The same through vesin."""
    rival = NeighborList(cutoff=cutoff, full_list=True)
    inputs = [(np.ascontiguousarray(f @ c), np.ascontiguousarray(c)) for f, c in per_crystal(crystals)]

    def find():
        return [rival.compute(points=x, box=c, periodic=True, quantities="ijSDd") for x, c in inputs]

    return find, lambda found: np.concatenate([f[4] for f in found])


@pytest.mark.parametrize("rival", [ours, pymatgen, vesin], ids=lambda f: f.__name__)
@pytest.mark.parametrize("cutoff", [4.0, 6.0, 8.0])
def bench_radius(benchmark, crystals, cutoff, rival):
    benchmark.group = f"all pairs within {cutoff} Å, {NUM_CRYSTALS} crystals"
    expected = np.sort(ours(crystals, cutoff)[0]().edge_vec.norm(dim=1).numpy())
    find, distances = rival(crystals, cutoff)
    np.testing.assert_allclose(np.sort(distances(find())), expected, atol=1e-6)
    benchmark(find)


@pytest.mark.parametrize("compat", [None, "comformer"])
@pytest.mark.parametrize("k", [12, 25])
def bench_graph(benchmark, crystals, k, compat):
    benchmark.group = f"graph of {k} neighbours, {NUM_CRYSTALS} crystals"
    graph = benchmark(build_graph, crystals, max_neighbors=k, compat=compat, threads=1)
    assert (graph.row_ptr.diff() >= k).all()
