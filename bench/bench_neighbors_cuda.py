"""Neighbour lists on a GPU: ours beside nvalchemi-toolkit-ops and vesin, on crystals of Materials Project.

Every rival must find pairs at the same distances before it is timed; what is not installed is skipped.
nvalchemi works in float32, a rival's own choice of speed, and fills a matrix of neighbours; vesin is called
crystal by crystal. Positions are brought into the cell for both. Times are for the whole batch, the device
waited for at the end.
"""

from __future__ import annotations

import itertools

import numpy as np
import pairs
import pytest
import torch
from graphs import bundled_crystals

from mgt_fast import CrystalBatch, build_graph, neighbor_list

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUTOFF = 6.0  # Å
PAIR_SECONDS = 1.0


def crystals_on_device(count) -> CrystalBatch:
    dataset, order = bundled_crystals()
    return dataset.gather(order[np.arange(count) % len(order)]).to("cuda")


def silicon_on_device(repeats) -> CrystalBatch:
    """A crystal of 8 repeats^3 atoms."""
    face = np.array([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]]) / 4
    cell = np.concatenate([face, face + 0.25])
    shifts = np.stack(np.meshgrid(*[np.arange(repeats)] * 3), -1).reshape(-1, 1, 3)
    frac = ((shifts + cell) / repeats).reshape(-1, 3)
    lattice = 5.43 * repeats * np.eye(3)[None]
    return CrystalBatch.from_arrays(np.full(len(frac), 14), frac, lattice, [len(frac)]).to("cuda")


def cell_of_atom(crystals) -> torch.Tensor:
    """Lattice vectors around each atom, Å."""
    return crystals.cell.repeat_interleave(crystals.num_atoms, dim=0)


def positions_of(crystals) -> torch.Tensor:
    """Cartesian positions inside the cell, Å."""
    return torch.einsum("na,nab->nb", crystals.frac_coords % 1, cell_of_atom(crystals))


def ours(crystals):
    """Return a function that finds the pairs, and one that takes their distances, Å, from what it found."""
    return lambda: neighbor_list(crystals, cutoff=CUTOFF), lambda found: found.edge_vec.norm(dim=1)


def ours_captured(crystals):
    """The same with arrays of fixed capacity, replayed from a CUDA graph."""
    capacity = int(1.1 * neighbor_list(crystals, cutoff=CUTOFF).edge_vec.shape[0])
    graph, found = captured(lambda: neighbor_list(crystals, cutoff=CUTOFF, max_edges=capacity))
    return graph.replay, lambda _: found.edge_vec[: found.status.check()].norm(dim=1)


def captured(run):
    """Capture `run` in a CUDA graph; return the graph and what `run` returned."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph, found


def nvalchemi(crystals):
    """The same through nvalchemi-toolkit-ops, with a matrix as wide as is needed."""
    neighbors = pytest.importorskip("nvalchemiops.torch.neighbors")
    widest = int(neighbor_list(crystals, cutoff=CUTOFF).row_ptr.diff().max())
    positions, cell = positions_of(crystals).float(), crystals.cell.float()
    batch_ptr, cells = crystals.batch_ptr.int(), cell_of_atom(crystals)

    def find():
        return neighbors.neighbor_list(
            positions, CUTOFF, cell=cell, pbc=crystals.pbc, batch_ptr=batch_ptr, max_neighbors=widest + 8
        )

    def distances(found):
        matrix, count, shift = found
        kept = torch.arange(matrix.shape[1], device=matrix.device) < count[:, None]
        i, _ = kept.nonzero(as_tuple=True)
        steps = torch.einsum("ea,eab->eb", shift[kept].double(), cells[i])
        return (positions[matrix[kept]] - positions[i] + steps).norm(dim=1)

    return find, distances


def vesin(crystals):
    """The same through vesin and CuPy arrays."""
    cupy, rival = pytest.importorskip("cupy"), pytest.importorskip("vesin")
    search = rival.NeighborList(cutoff=CUTOFF, full_list=True)
    positions, starts = positions_of(crystals), crystals.batch_ptr.tolist()
    inputs = [
        (cupy.asarray(positions[a:b].contiguous()), cupy.asarray(crystals.cell[n]))
        for n, (a, b) in enumerate(itertools.pairwise(starts))
    ]

    def find():
        return [search.compute(points=x, box=c, periodic=True, quantities="ijSD") for x, c in inputs]

    return find, lambda found: torch.cat([torch.as_tensor(f[3]) for f in found]).norm(dim=1)


@pytest.fixture
def size(request):
    """Crystals a batch."""
    return 8 if request.config.getoption("smoke") else 512


def measure(benchmark, run, size):
    def timed():
        run()
        torch.cuda.synchronize()

    benchmark(timed)
    benchmark.extra_info["crystals_per_second"] = size / benchmark.stats.stats.median


@pytest.mark.parametrize("rival", [ours, ours_captured, nvalchemi, vesin], ids=lambda f: f.__name__)
def bench_radius_on_gpu(benchmark, size, rival):
    benchmark.group = f"all pairs within {CUTOFF} Å, {size} crystals, GPU"
    compare(benchmark, rival, crystals_on_device(size))


@pytest.mark.parametrize("rival", [ours, ours_captured, nvalchemi, vesin], ids=lambda f: f.__name__)
def bench_large_crystal_on_gpu(benchmark, request, rival):
    repeats = 3 if request.config.getoption("smoke") else 24
    benchmark.group = f"all pairs within {CUTOFF} Å, {8 * repeats**3} atoms of silicon, GPU"
    compare(benchmark, rival, silicon_on_device(repeats))


def compare(benchmark, rival, crystals):
    """Time the rival once its answer is that of the others."""
    expected = neighbor_list(crystals, cutoff=CUTOFF).edge_vec.norm(dim=1).sort().values
    find, distances = rival(crystals)
    found = distances(find()).double().sort().values
    # In float32 a pair right on the cutoff, the last ones here, may fall on the other side.
    shared = min(len(found), len(expected))
    assert shared >= (1 - (1e-4 if rival is nvalchemi else 0)) * max(len(found), len(expected))
    torch.testing.assert_close(
        found[:shared], expected[:shared], rtol=0, atol=1e-3 if rival is nvalchemi else 1e-6
    )
    measure(benchmark, find, len(crystals))
    if rival in (ours, ours_captured):
        name = benchmark.name.replace(rival.__name__, nvalchemi.__name__)
        pairs.against(benchmark, name, find, lambda: nvalchemi(crystals)[0], PAIR_SECONDS)
    benchmark.extra_info["ns_per_pair"] = 1e9 * benchmark.stats.stats.median / len(expected)


@pytest.mark.parametrize("k", [12, 25])
@pytest.mark.parametrize("replayed", [False, True], ids=["exact", "captured"])
@pytest.mark.parametrize("build", [neighbor_list, build_graph], ids=lambda f: f.__name__)
def bench_nearest_on_gpu(benchmark, size, build, k, replayed):
    """Whole shells of the k nearest neighbours, and the graph, which has the lattice frame besides."""
    benchmark.group = f"{k} nearest neighbours, {size} crystals, GPU"
    crystals = crystals_on_device(size)
    n_edges = build(crystals, max_neighbors=k).edge_vec.shape[0]

    def run(max_edges=None):
        return build(crystals, max_neighbors=k, max_edges=max_edges)

    if replayed:
        graph, found = captured(lambda: run(int(1.1 * n_edges)))
        graph.replay()
        assert found.status.check() == n_edges
        run = graph.replay
    measure(benchmark, run, size)
