"""What a change of description does to a neighbour list, and what other programs find."""

import numpy as np
import pytest
from crystals import (
    Crystal,
    batch_of,
    prototype_structures,
    prototypes,
    random_rotation,
    random_unimodular,
    supercell,
)

from mgt_fast import CrystalBatch, neighbor_list

MODES = {"cutoff": {"cutoff": 5.3}, "nearest": {"max_neighbors": 16}}
CRYSTALS = [crystal for _, crystal in prototypes(30)][::6]


def edges_of(crystal, mode):
    found = neighbor_list(batch_of(crystal), **mode)
    return found.edge_index.numpy(), found.cell_shift.numpy(), found.edge_vec.numpy()


def assert_same_edges(found, expected):
    """The same edges (i, j, S) with the same vectors, in whatever order `expected` has them."""
    index, shift, vectors = expected
    order = np.lexsort((*shift.T[::-1], *index[::-1]))
    np.testing.assert_array_equal(found[0], index[:, order])
    np.testing.assert_array_equal(found[1], shift[order])
    np.testing.assert_allclose(found[2], vectors[order], rtol=0, atol=1e-9)


@pytest.fixture(params=MODES.values(), ids=MODES)
def mode(request):
    return request.param


def test_a_rotation_turns_the_vectors(mode):
    rng = np.random.default_rng(0)
    for crystal in CRYSTALS:
        rotation = random_rotation(rng)
        index, shift, vectors = edges_of(crystal, mode)
        turned = edges_of(crystal._replace(cell=crystal.cell @ rotation), mode)
        assert_same_edges(turned, (index, shift, vectors @ rotation))


def test_another_order_of_atoms_renumbers_them(mode):
    rng = np.random.default_rng(1)
    for crystal in CRYSTALS:
        order = rng.permutation(len(crystal.numbers))
        index, shift, vectors = edges_of(crystal, mode)
        shuffled = edges_of(crystal._replace(numbers=crystal.numbers[order], frac=crystal.frac[order]), mode)
        assert_same_edges(shuffled, (np.argsort(order)[index], shift, vectors))


def test_another_cell_changes_the_shifts_alone(mode):
    rng = np.random.default_rng(2)
    for crystal in CRYSTALS:
        change = random_unimodular(rng, steps=10)
        back = np.rint(np.linalg.inv(change)).astype(int)
        index, shift, vectors = edges_of(crystal, mode)
        other = edges_of(crystal._replace(frac=crystal.frac @ back, cell=change @ crystal.cell), mode)
        assert_same_edges(other, (index, shift @ back, vectors))


def test_another_origin_changes_nothing(mode):
    rng = np.random.default_rng(3)
    for crystal in CRYSTALS:
        moved = edges_of(crystal._replace(frac=crystal.frac + rng.uniform(-3, 3, 3)), mode)
        assert_same_edges(moved, edges_of(crystal, mode))


def test_atoms_moved_to_other_cells_change_the_shifts_alone(mode):
    rng = np.random.default_rng(4)
    for crystal in CRYSTALS:
        whole = rng.integers(-3, 4, crystal.frac.shape)
        index, shift, vectors = edges_of(crystal, mode)
        moved = edges_of(crystal._replace(frac=crystal.frac + whole), mode)
        assert_same_edges(moved, (index, shift - whole[index[1]] + whole[index[0]], vectors))


def test_a_supercell_repeats_the_edges(mode):
    repeats = np.array([2, 1, 3])
    for crystal in CRYSTALS:
        index, shift, vectors = edges_of(crystal, mode)
        cells = np.stack(np.meshgrid(*map(np.arange, repeats), indexing="ij"), -1).reshape(-1, 3)
        # Atom i in cell c points to atom j in cell c + S: of the supercell at S' there is the rest.
        reached = cells[:, None] + shift
        inside = reached % repeats
        flat = np.ravel_multi_index(tuple(np.moveaxis(inside, -1, 0)), repeats)
        own = np.broadcast_to(np.arange(len(cells))[:, None], flat.shape)
        expected = (
            np.stack([index[0] * len(cells) + own, index[1] * len(cells) + flat]).reshape(2, -1),
            ((reached - inside) // repeats).reshape(-1, 3),
            np.broadcast_to(vectors, (len(cells), *vectors.shape)).reshape(-1, 3),
        )
        assert_same_edges(edges_of(supercell(crystal, repeats), mode), expected)


def pymatgen(structure, cutoff):
    i, j, shift, d = structure.get_neighbor_list(cutoff)
    return i, j, shift, d


def vesin(structure, cutoff):
    search = pytest.importorskip("vesin").NeighborList(cutoff=cutoff, full_list=True)
    cell = np.ascontiguousarray(structure.lattice.matrix)
    return search.compute(
        points=np.ascontiguousarray(structure.cart_coords), box=cell, periodic=True, quantities="ijSd"
    )


def matscipy(structure, cutoff):
    search = pytest.importorskip("matscipy_neighbours").neighbour_list
    cell = np.ascontiguousarray(structure.lattice.matrix)
    return search("ijSd", positions=structure.cart_coords, cell=cell, pbc=[True] * 3, cutoff=cutoff)


@pytest.mark.parametrize("cutoff", [3.0, 7.0])
@pytest.mark.parametrize("peer", [pymatgen, vesin, matscipy], ids=lambda f: f.__name__)
def test_agrees_with_other_programs_on_real_structures(peer, cutoff):
    structures = [s.copy() for s in prototype_structures() if len(s) <= 40][::3]
    for structure in structures:
        structure.translate_sites(range(len(structure)), [0, 0, 0], to_unit_cell=True)
    neighbors = neighbor_list(CrystalBatch.from_structures(structures), cutoff=cutoff)
    distances = np.linalg.norm(neighbors.edge_vec.numpy(), axis=1)
    atom = 0
    for structure in structures:
        i, j, shift, d = (np.asarray(array) for array in peer(structure, cutoff))
        order = np.lexsort((*np.rint(shift).astype(int).T[::-1], j, i))
        edges = slice(int(neighbors.row_ptr[atom]), int(neighbors.row_ptr[atom + len(structure)]))
        np.testing.assert_array_equal(
            neighbors.edge_index[:, edges].numpy() - atom, np.stack([i, j])[:, order]
        )
        np.testing.assert_array_equal(neighbors.cell_shift[edges].numpy(), shift[order])
        np.testing.assert_allclose(distances[edges], d[order], atol=1e-8)
        atom += len(structure)


def test_one_atom_in_a_box_of_its_own():
    lonely = Crystal(np.array([2]), np.array([[0.3, -4.0, 9.0]]), np.diag([30.0, 40.0, 50.0]))
    assert neighbor_list(batch_of(lonely), cutoff=29.9).edge_vec.shape[0] == 0
    assert neighbor_list(batch_of(lonely), max_neighbors=1).cell_shift.tolist() == [[-1, 0, 0], [1, 0, 0]]
    assert neighbor_list(batch_of(lonely, pbc=[False] * 3), cutoff=1e3).edge_vec.shape[0] == 0
