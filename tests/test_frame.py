"""The lattice frame must depend on the crystal alone, as far as a network sees it."""

import itertools

import numpy as np
import pytest
from crystals import Crystal, batch_of, described_anew, prototypes, supercell

from mgt_fast import build_graph

A = 4.0
LATTICES = {
    "simple cubic": A * np.eye(3),
    "face-centred cubic": A / 1.3 * np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]),
    "body-centred cubic": A / 1.5 * np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]),
    "hexagonal": A * np.array([[1, 0, 0], [-0.5, 3**0.5 / 2, 0], [0, 0, 1.3]]),
    "hexagonal, c = a": A * np.array([[1, 0, 0], [-0.5, 3**0.5 / 2, 0], [0, 0, 1]]),
    "tetragonal": A * np.diag([1, 1, 1.4]),
    "body-centred tetragonal": A / 1.5 * np.array([[-1, 1, 1.3], [1, -1, 1.3], [1, 1, -1.3]]),
    "rhombohedral, acute": A * np.array([[1, 0.2, 0.2], [0.2, 1, 0.2], [0.2, 0.2, 1]]),
    "rhombohedral, obtuse": A * np.array([[1, -0.15, -0.15], [-0.15, 1, -0.15], [-0.15, -0.15, 1]]),
    "orthorhombic": A * np.diag([1, 1.2, 1.4]),
    "face-centred orthorhombic": A / 1.3 * np.array([[0, 1, 1.2], [1.1, 0, 1.2], [1.1, 1, 0]]),
    "body-centred orthorhombic": A / 1.5 * np.array([[-1, 1.1, 1.2], [1, -1.1, 1.2], [1, 1.1, -1.2]]),
    "base-centred orthorhombic": A / 1.3 * np.array([[1, 1.2, 0], [-1, 1.2, 0], [0, 0, 1.3]]),
    "monoclinic": A * np.array([[1, 0, 0], [0, 1.1, 0], [-0.3, 0, 1.2]]),
    "triclinic": A * np.array([[1, 0, 0], [0.2, 1.1, 0], [-0.3, 0.1, 1.2]]),
}


def as_seen_by_a_network(graph):
    """Eight numbers a crystal from three rounds of messages between its atoms.

    Like the model they see elements, lengths, and the frame through |L_m| and the cosines, summed over m.
    Their weights are generic, so that two frames a network could tell apart give other numbers.
    """
    rng = np.random.default_rng(0)
    (i, j), vectors = graph.edge_index.numpy(), graph.edge_vec.numpy()
    frame = graph.frame.numpy()[graph.batch.numpy()[i]]
    distance, length = np.linalg.norm(vectors, axis=1), np.linalg.norm(frame, axis=2)
    cosine = np.einsum("ek,emk->em", vectors, frame) / distance[:, None] / length
    seen = np.stack([3 * cosine, length, np.ones_like(cosine)], -1) @ rng.normal(size=(3, 24))
    edges = np.column_stack([np.sin(seen).sum(1), np.exp(-distance / 2)])
    atoms = np.cos(graph.numbers.numpy()[:, None] * 0.2 * rng.normal(size=8))
    for _ in range(3):
        weights = 0.5 * rng.normal(size=(edges.shape[1] + 16, 8))
        messages = (
            np.tanh(np.column_stack([edges, atoms[i], atoms[j]]) @ weights) * np.exp(-distance / 3)[:, None]
        )
        received = np.zeros_like(atoms)
        np.add.at(received, j, messages)
        atoms = np.sin(received + atoms)
    return np.add.reduceat(atoms, graph.batch_ptr[:-1].numpy()) / graph.batch_ptr.diff().numpy()[:, None]


def assert_same_for_all_descriptions(
    crystal, rng, max_neighbors=12, repeats=((1, 1, 1), (2, 1, 1), (1, 2, 2))
):
    same = [crystal, *(described_anew(supercell(crystal, r), rng) for r in repeats)]
    seen = as_seen_by_a_network(build_graph(batch_of(*same), max_neighbors=max_neighbors))
    np.testing.assert_allclose(seen[1:], seen[:1].repeat(len(repeats), 0), rtol=0, atol=1e-6)


def symmetry_operations(cell):
    """The lattice's point group, as integer matrices on fractional coordinates."""
    metric = cell @ cell.T
    candidates = np.array(list(itertools.product((-1, 0, 1), repeat=9))).reshape(-1, 3, 3)
    kept = np.isclose(candidates @ metric @ candidates.transpose(0, 2, 1), metric, atol=1e-8).all((1, 2))
    return candidates[kept]


def random_motif(cell, operations, rng):
    """Atoms that have a random subgroup of the lattice's point group as their symmetry."""
    generators = operations[rng.integers(len(operations), size=rng.integers(0, 3))]
    group = np.eye(3, dtype=int)[None]
    while True:
        larger = np.unique(np.concatenate([group, *(group @ g for g in generators)]), axis=0)
        if len(larger) == len(group):
            break
        group = larger
    numbers, frac = [], []
    for _ in range(rng.integers(1, 4)):
        number, site = rng.choice([6, 14, 8]), rng.random(3)
        if rng.random() < 0.3:
            site = np.round(4 * site) / 4
        for image in (site @ group) % 1:
            apart = (np.array([image - f for f in frac]).reshape(-1, 3) + 0.5) % 1 - 0.5
            if (np.linalg.norm(apart @ cell, axis=1) > 0.1).all():
                frac.append(image)
                numbers.append(number)
    scale = max(1.0, (len(frac) / 4) ** (1 / 3))
    return Crystal(np.array(numbers), np.array(frac), scale * cell)


@pytest.mark.parametrize(("displacement", "start"), [(0.0, 0), (1e-4, 1), (0.05, 2)])
def test_prototypes(displacement, start):
    """Exact, symmetric but for noise, and with motifs of low symmetry in lattices of high symmetry."""
    # A third of them each. By hand all 288 were checked at each displacement: 0 of 820 descriptions look
    # different. If the edges did not choose the frame 140 would, of 79 prototypes (displaced: 574, of 256).
    rng = np.random.default_rng(0)
    for _, crystal in list(prototypes(max_atoms=30))[start::3]:
        moved = displacement * rng.normal(size=crystal.frac.shape) @ np.linalg.inv(crystal.cell)
        assert_same_for_all_descriptions(crystal._replace(frac=crystal.frac + moved), rng)


def test_large_prototypes():
    rng = np.random.default_rng(1)
    for _, crystal in prototypes():
        if len(crystal.frac) > 30:
            assert_same_for_all_descriptions(crystal, rng, repeats=((1, 1, 1), (2, 1, 1)))


@pytest.mark.parametrize("strain", [1e-5, 1e-3])
def test_nearly_symmetric_lattices(strain):
    rng = np.random.default_rng(2)
    for _, crystal in prototypes(max_atoms=10):
        cell = crystal.cell @ (np.eye(3) + strain * rng.normal(size=(3, 3)))
        assert_same_for_all_descriptions(crystal._replace(cell=cell), rng)


@pytest.mark.parametrize("cell", LATTICES.values(), ids=LATTICES)
def test_every_kind_of_motif_in_every_kind_of_lattice(cell):
    rng = np.random.default_rng(3)
    operations = symmetry_operations(cell)
    for _ in range(25):
        assert_same_for_all_descriptions(random_motif(cell, operations, rng), rng, max_neighbors=8)


def test_long_cells():
    rng = np.random.default_rng(4)
    for _ in range(20):
        cell = np.diag(3.0 * 100 ** rng.random(3)) + 0.3 * rng.integers(0, 2) * rng.normal(size=(3, 3))
        n_atoms = rng.integers(1, 4)
        crystal = Crystal(rng.integers(1, 4, n_atoms), rng.random((n_atoms, 3)), cell)
        assert_same_for_all_descriptions(crystal, rng, max_neighbors=8)


@pytest.mark.parametrize("cell", LATTICES.values(), ids=LATTICES)
def test_the_frame_is_a_right_handed_reduced_basis_of_the_primitive_lattice(cell):
    rng = np.random.default_rng(5)
    crystal = Crystal(np.array([6, 8]), np.array([[0, 0, 0], [0.31, 0.17, 0.23]]), cell)
    coefficients = np.array(list(itertools.product(range(-3, 4), repeat=3)))
    vectors = coefficients @ cell
    order = np.argsort(np.linalg.norm(vectors, axis=1))[1:]
    minima = []  # the successive minima: each the shortest vector independent of those before
    for vector in vectors[order]:
        if np.linalg.matrix_rank(np.array([*minima, vector]), tol=1e-6) > len(minima):
            minima.append(vector)
    for description in (crystal, described_anew(supercell(crystal, (2, 3, 1)), rng)):
        (frame,) = build_graph(batch_of(description)).frame.numpy()
        lengths = np.linalg.norm(frame, axis=1)
        np.testing.assert_allclose(lengths, np.linalg.norm(minima, axis=1), rtol=2e-4)
        np.testing.assert_allclose(np.linalg.det(frame), abs(np.linalg.det(cell)), rtol=1e-9)
        cosines = frame @ frame.T / np.outer(lengths, lengths)
        assert (cosines[0, 1:] > -1e-4).all()


def test_a_translation_must_keep_the_elements():
    """CsCl is not body-centred, tungsten in the same cell is."""
    frac = np.array([[0, 0, 0], [0.5, 0.5, 0.5]])
    cell = 3.2 * np.eye(3)
    batch = batch_of(Crystal(np.array([55, 17]), frac, cell), Crystal(np.array([74, 74]), frac, cell))
    salt, metal = build_graph(batch).frame.norm(dim=2).numpy()
    np.testing.assert_allclose(salt, 3.2)
    np.testing.assert_allclose(metal, 3.2 * 3**0.5 / 2)


@pytest.mark.parametrize(("vacancies", "fraction"), [([[0, 0, 0]], 1), ([[0, 0, 0], [3, 3, 3]], 2)])
def test_translations_of_a_supercell_with_vacancies(vacancies, fraction):
    """Of many that keep almost all atoms the one that keeps all is found, wherever it stands among them."""
    sites = np.array([site for site in itertools.product(range(6), repeat=3) if list(site) not in vacancies])
    for seed in range(4):
        frac = np.random.default_rng(seed).permutation(sites) / 6
        frame = build_graph(batch_of(Crystal(np.full(len(frac), 6), frac, 6 * A * np.eye(3)))).frame[0]
        assert np.linalg.det(frame.numpy()) == pytest.approx((6 * A) ** 3 / fraction)


def test_the_two_ends_of_a_polar_axis_are_told_apart():
    """Zincblende lacks inversion: turning it by 90 degrees about a cubic axis gives another orientation."""
    rng = np.random.default_rng(6)
    gallium_arsenide = Crystal(
        np.array([31, 33]), np.array([[0, 0, 0], [0.25, 0.25, 0.25]]), LATTICES["face-centred cubic"]
    )
    assert_same_for_all_descriptions(gallium_arsenide, rng, repeats=((1, 1, 1),) * 40)


def test_mirror_images_have_frames_of_their_own():
    """Both frames are right-handed, so a chiral crystal looks unlike its mirror image, any other alike."""
    rng = np.random.default_rng(7)
    mirror = np.diag([1.0, 1.0, -1.0])
    for numbers, same in (([31, 33], True), ([6, 7, 8, 9, 15], False)):
        frac = np.array([[0, 0, 0], [0.25, 0.25, 0.25]]) if same else rng.random((5, 3))
        crystal = Crystal(np.array(numbers), frac, LATTICES["face-centred cubic"])
        mirrored = described_anew(crystal._replace(cell=crystal.cell @ mirror), rng)
        seen = as_seen_by_a_network(build_graph(batch_of(crystal, mirrored)))
        assert (np.abs(seen[1] - seen[0]).max() < 1e-6) == same


def test_axes_without_periodicity_keep_the_given_vector():
    rng = np.random.default_rng(8)
    cell = np.array([[3.0, 0, 0], [-1.5, 1.5 * 3**0.5, 0], [0.5, 0, 20.0]])
    slab = Crystal(np.array([6, 7, 8]), np.array([[0, 0, 0.4], [0.1, 0.3, 0.5], [0.7, 0.2, 0.55]]), cell)
    sheared = np.array([[1, 0, 0], [2, 1, 0], [0, 0, 1]])
    doubled = supercell(slab, (2, 1, 1))
    described = Crystal(slab.numbers, slab.frac @ np.linalg.inv(sheared), sheared @ cell)
    order = rng.permutation(6)
    described_twice = doubled._replace(numbers=doubled.numbers[order], frac=doubled.frac[order])
    graphs = [
        build_graph(batch_of(c, pbc=[True, True, False]), max_neighbors=8)
        for c in (slab, described, described_twice)
    ]
    for graph in graphs:
        np.testing.assert_allclose(graph.frame[0, 2], cell[2])
        np.testing.assert_allclose(graph.frame[0, :2].norm(dim=1), 3.0)
        assert np.linalg.det(graph.frame[0]) > 0
    seen = np.concatenate([as_seen_by_a_network(g) for g in graphs])
    np.testing.assert_allclose(seen, seen[:1].repeat(3, 0), atol=1e-9)
    wire = build_graph(batch_of(slab, pbc=[False, True, False]), max_neighbors=2)
    assert np.linalg.det(wire.frame[0]) > 0
    np.testing.assert_allclose(wire.frame[0, 1:], cell[[0, 2]])
    molecule = build_graph(batch_of(slab, pbc=[False, False, False]), max_neighbors=2)
    np.testing.assert_allclose(molecule.frame[0], cell)
