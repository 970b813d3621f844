"""The neighbour list and the graph on the CPU: ours beside pymatgen, vesin, matscipy and nvalchemi.

A rival must find the same pairs before it is timed; one that is not installed is skipped (nvalchemi, which
brings much along, comes with `pip install --no-deps nvalchemi-toolkit-ops warp-lang`). All run on one thread,
where not said otherwise, and times are for the whole batch. pymatgen, vesin and matscipy are called crystal
by crystal, as their interfaces ask; pymatgen returns no vectors. `ns_a_pair` can be held against a floor of
1-2 ns, what writing 52 bytes takes. Silicon stands for large crystals; carbon_24 and perov_5 are used where
they lie beside the repository.
"""

from __future__ import annotations

import csv
import gzip
import os
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pairs
import pytest
import torch
from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
from pymatgen.core import Structure
from pymatgen.optimization.neighbors import find_points_in_spheres

from mgt_fast import CrystalBatch, build_graph, neighbor_list
from mgt_fast.data import CrystalDataset

FULL = pytest.mark.full
NUM_CRYSTALS = 256
PAIR_SECONDS = 1.0
SMALL = 63  # atoms
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

# ComFormer's published builder, mean milliseconds a crystal for k = 25, on one core of an AMD EPYC 9004.
COMFORMER_MS = {"carbon_24": 8.2, "perov_5": 9.5, "prototypes": 51.0}
SETS = ("bundled", "prototypes", *(pytest.param(name, marks=FULL) for name in ("carbon_24", "perov_5")))


@lru_cache(maxsize=len(SETS))
def small_crystals(name: str) -> CrystalBatch:
    """Crystals of below 64 atoms."""
    if name == "bundled":
        dataset = CrystalDataset.open(None)
        return dataset.gather(np.random.default_rng(0).permutation(len(dataset))[:NUM_CRYSTALS])
    if name == "prototypes":
        structures = [entry["snl"].structure for entry in AFLOW_PROTOTYPE_LIBRARY]
    else:
        path = SHARED_DATA / name / "val.csv.gz"
        if not path.exists():
            pytest.skip(f"{name} is not here")
        with gzip.open(path, "rt") as lines:
            rows = [row for row, _ in zip(csv.DictReader(lines), range(NUM_CRYSTALS), strict=False)]
        structures = [Structure.from_str(row["cif"], fmt="cif") for row in rows]
    small = [structure for structure in structures if len(structure) <= SMALL]
    return CrystalBatch.from_structures(small[:NUM_CRYSTALS])


@lru_cache(maxsize=2)
def silicon(repeats: int) -> CrystalBatch:
    """One crystal of 8 repeats^3 atoms, slightly out of place."""
    cell = (
        np.array([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0], [1, 1, 1], [1, 3, 3], [3, 1, 3], [3, 3, 1]]) / 4
    )
    shifts = np.stack(np.meshgrid(*[np.arange(repeats)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    frac = (shifts + cell).reshape(-1, 3) + np.random.default_rng(0).normal(
        scale=0.005, size=(8 * repeats**3, 3)
    )
    numbers = np.full(len(frac), 14)
    return CrystalBatch.from_arrays(numbers, frac / repeats, 5.43 * repeats * np.eye(3)[None], [len(frac)])


def per_crystal(crystals: CrystalBatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positions and cell of each crystal, Å; atoms inside the cell, which some rivals need."""
    ptr = crystals.batch_ptr.tolist()
    cells = [np.ascontiguousarray(cell) for cell in crystals.cell.numpy()]
    return [
        (np.ascontiguousarray((crystals.frac_coords[ptr[b] : ptr[b + 1]].numpy() % 1) @ cell), cell)
        for b, cell in enumerate(cells)
    ]


# A rival takes crystals and a cutoff, Å, and returns a function that finds the pairs, and one that takes the
# distances, Å, from what it found.


def ours(crystals, cutoff, threads=1):
    return lambda: neighbor_list(crystals, cutoff=cutoff, threads=threads), lambda found: found.edge_vec.norm(
        dim=1
    ).numpy()


def pymatgen(crystals, cutoff):
    periodic, inputs = np.array([1, 1, 1]), per_crystal(crystals)

    def find():
        return [find_points_in_spheres(x, x, r=cutoff, pbc=periodic, lattice=c, tol=1e-8) for x, c in inputs]

    def distances(found):
        lengths = np.concatenate([f[3] for f in found])
        return lengths[lengths > 1e-8]  # each atom counts itself

    return find, distances


def vesin(crystals, cutoff, **options):
    search = pytest.importorskip("vesin").NeighborList(cutoff=cutoff, full_list=True, **options)
    inputs = per_crystal(crystals)

    def find():
        return [search.compute(points=x, box=c, periodic=True, quantities="ijSDd") for x, c in inputs]

    return find, lambda found: np.concatenate([f[4] for f in found])


def vesin_sorted(crystals, cutoff):
    return vesin(crystals, cutoff, sorted=True)


def matscipy(crystals, cutoff):
    search = pytest.importorskip("matscipy_neighbours").neighbour_list
    inputs, periodic = per_crystal(crystals), [True] * 3

    def find():
        return [search("ijSDd", positions=x, cell=c, pbc=periodic, cutoff=cutoff) for x, c in inputs]

    return find, lambda found: np.concatenate([f[4] for f in found])


def nvalchemi(crystals, cutoff):
    search = pytest.importorskip("nvalchemiops.torch.neighbors").neighbor_list
    positions = torch.from_numpy(np.concatenate([x for x, _ in per_crystal(crystals)]))
    batch_ptr, crystal = (
        crystals.batch_ptr.int(),
        torch.arange(len(crystals)).repeat_interleave(crystals.num_atoms),
    )
    widest = int(neighbor_list(crystals, cutoff=cutoff).row_ptr.diff().max()) + 8

    def find():
        return search(
            positions,
            cutoff,
            cell=crystals.cell,
            pbc=crystals.pbc,
            batch_ptr=batch_ptr,
            max_neighbors=widest,
            return_neighbor_list=True,
        )

    def distances(found):
        (i, j), _, shift = found
        steps = torch.einsum("ea,eab->eb", shift.double(), crystals.cell[crystal[i]])
        return (positions[j] - positions[i] + steps).norm(dim=1).numpy()

    return find, distances


def measure(benchmark, rival, crystals, cutoff, *, against=None, **options):
    """Compare what a rival finds with what we find, then time it; ours also in turns with `against`."""
    find = checked(rival, crystals, cutoff, **options)
    benchmark(find)
    if benchmark.stats:
        expected = ours(crystals, cutoff)[0]().edge_vec.shape[0]
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["pairs"] = expected
        benchmark.extra_info["ns_a_pair"] = round(1e9 * seconds / expected, 2)
        benchmark.extra_info["us_a_crystal"] = round(1e6 * seconds / len(crystals), 2)
    if against and rival is ours:
        name = benchmark.name.replace("ours", named(against))
        pairs.against(benchmark, name, find, partial(checked, against, crystals, cutoff), PAIR_SECONDS)


def checked(rival, crystals, cutoff, **options):
    """Return a rival's function that finds the pairs, once its answers have been compared with ours."""
    search, lengths = ours(crystals, cutoff)
    expected = np.sort(lengths(search()))
    find, distances = rival(crystals, cutoff, **options)
    np.testing.assert_allclose(np.sort(distances(find())), expected, atol=1e-6)
    return find


def named(function):
    return function.__name__


FAST = pytest.param(ours, marks=pytest.mark.fast)


def full(*values):
    """Parameters that `make bench` leaves out."""
    return [pytest.param(value, marks=FULL) for value in values]


@pytest.mark.parametrize("rival", [FAST, pymatgen, vesin, matscipy, nvalchemi], ids=named)
@pytest.mark.parametrize("cutoff", [4.0, 6.0, *full(8.0, 12.0)])
@pytest.mark.parametrize("name", SETS)
def bench_small(benchmark, name, cutoff, rival):
    benchmark.group = f"pairs within {cutoff:g} Å, small crystals: {name}"
    measure(benchmark, rival, small_crystals(name), cutoff, against=pymatgen)


@pytest.mark.parametrize("rival", [FAST, pymatgen, vesin, matscipy], ids=named)
@pytest.mark.parametrize("repeats", [*full(4, 6), 8])
def bench_medium(benchmark, repeats, rival):
    benchmark.group = f"pairs within 6 Å, {8 * repeats**3} atoms"
    measure(benchmark, rival, silicon(repeats), 6.0, against=matscipy)


@pytest.mark.parametrize("rival", [FAST, vesin, vesin_sorted, matscipy], ids=named)
@pytest.mark.parametrize("repeats", [16, *full(24)])
def bench_large(benchmark, repeats, rival):
    benchmark.group = f"pairs within 6 Å, {8 * repeats**3} atoms"
    measure(benchmark, rival, silicon(repeats), 6.0, against=matscipy)


@pytest.mark.fast
@pytest.mark.parametrize("compat", [None, "comformer"])
@pytest.mark.parametrize("k", [12, 25])
@pytest.mark.parametrize("name", SETS)
def bench_graph(benchmark, name, k, compat):
    """The whole graph; the published builder's time stands beside it as it was measured elsewhere."""
    crystals = small_crystals(name)
    benchmark.group = f"graph of {k} neighbours: {name}"
    build = partial(build_graph, crystals, max_neighbors=k, compat=compat, threads=1)
    graph = benchmark(build)
    assert (graph.row_ptr.diff() >= k).all()
    if benchmark.stats:
        milliseconds = 1e3 * benchmark.stats.stats.median / len(crystals)
        benchmark.extra_info["us_a_crystal"] = round(1e3 * milliseconds, 2)
        if k == 25 and name in COMFORMER_MS:
            benchmark.extra_info["comformer_ms_a_crystal"] = COMFORMER_MS[name]
            benchmark.extra_info["times_comformer"] = round(COMFORMER_MS[name] / milliseconds)
    rival = partial(checked, pymatgen, crystals, 4.0)
    pairs.against(benchmark, f"bench_graph_pairs[{name}-{k}]", build, rival, PAIR_SECONDS)


@pytest.mark.parametrize("k", [12, 25])
@pytest.mark.parametrize("name", SETS)
def bench_graph_pairs(benchmark, name, k):
    """What any graph builder on top of pymatgen's search pays at least: the pairs within 4 Å."""
    benchmark.group = f"graph of {k} neighbours: {name}"
    measure(benchmark, pymatgen, small_crystals(name), 4.0)


def skewed(crystals: CrystalBatch) -> CrystalBatch:
    """The same crystals described with cells of an aspect of about 100."""
    change = torch.tensor([[1, 0, 0], [12, 1, 0], [-9, 11, 1]], dtype=torch.float64)
    return CrystalBatch.from_arrays(
        crystals.numbers.numpy(),
        (crystals.frac_coords @ torch.linalg.inv(change)).numpy(),
        (change @ crystals.cell).numpy(),
        crystals.num_atoms.numpy(),
    )


@pytest.mark.parametrize("rival", [FAST, pymatgen, *full(vesin, matscipy)], ids=named)
@pytest.mark.parametrize("described", [*full("as given"), "skewed"])
def bench_skewed(benchmark, described, rival):
    benchmark.group = "pairs within 6 Å, cells skewed to an aspect of 100"
    crystals = small_crystals("bundled")
    crystals = skewed(crystals) if described == "skewed" else crystals
    measure(benchmark, rival, crystals, 6.0, against=pymatgen)


@FULL
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("task", ["small crystals", "one large crystal", "graphs"])
def bench_threads(benchmark, task, threads):
    if (os.cpu_count() or 1) < threads:
        pytest.skip(f"needs {threads} cores")
    benchmark.group = f"threads: {task}"
    if task == "graphs":
        benchmark(build_graph, small_crystals("bundled"), threads=threads)
    else:
        crystals = silicon(16) if task == "one large crystal" else small_crystals("bundled")
        measure(benchmark, ours, crystals, 8.0, threads=threads)


@FULL
@pytest.mark.parametrize("repeats", [1, 2, 4, 8, 16, 24])
def bench_growth_with_atoms(benchmark, repeats):
    benchmark.group = "growth with atoms, 6 Å"
    measure(benchmark, ours, silicon(repeats), 6.0)


@FULL
@pytest.mark.parametrize("cutoff", [3.0, 4.0, 6.0, 8.0, 12.0, 16.0])
def bench_growth_with_cutoff(benchmark, cutoff):
    benchmark.group = "growth with cutoff, bundled crystals"
    measure(benchmark, ours, small_crystals("bundled"), cutoff)


@FULL
@pytest.mark.parametrize("batch", [1, 4, 16, 64, 256])
def bench_growth_with_batch(benchmark, batch):
    benchmark.group = "growth with batch, bundled crystals, 6 Å"
    crystals = small_crystals("bundled")
    atoms = int(crystals.batch_ptr[batch])
    part = CrystalBatch.from_arrays(
        crystals.numbers[:atoms].numpy(),
        crystals.frac_coords[:atoms].numpy(),
        crystals.cell[:batch].numpy(),
        crystals.num_atoms[:batch].numpy(),
    )
    measure(benchmark, ours, part, 6.0)
