import itertools
import math
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from crystals import Crystal, batch_of, described_anew, prototypes, supercell
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mgt_fast import _C, CrystalBatch, neighbor_list
from mgt_fast.graph import SHELL_TOLERANCE

CUBIC = Crystal(np.array([84]), np.zeros((1, 3)), 3.0 * np.eye(3))


def all_pairs(crystal, cutoff, pbc=(True, True, True)):
    """Oracle: (i, j, S, vector) of all pairs within the cutoff, by trying every image in the given cell."""
    frac, cell = crystal.frac, crystal.cell
    # Along axis a the fractional coordinate changes by at most cutoff * |dual_a|.
    reach = cutoff * np.linalg.norm(np.linalg.inv(cell), axis=0) + np.ptp(frac, axis=0)
    ranges = [range(-math.floor(r), math.floor(r) + 1) if p else [0] for r, p in zip(reach, pbc, strict=True)]
    images = np.array(list(itertools.product(*ranges)))
    vectors = (frac[None, :, None] - frac[:, None, None] + images) @ cell
    distances = np.linalg.norm(vectors, axis=-1)
    found = distances <= cutoff
    found[np.arange(len(frac)), np.arange(len(frac)), np.flatnonzero(~images.any(1))[0]] = False
    i, j, s = np.nonzero(found)  # sorted by i, j, then image: images are in lexicographic order
    return i, j, images[s], vectors[i, j, s]


def whole_shells(crystal, k, tolerance=1e-4, pbc=(True, True, True)):
    """Oracle of the k-nearest mode."""
    n_atoms, cutoff = len(crystal.frac), 1.0
    while True:
        i, j, shift, vectors = all_pairs(crystal, cutoff, pbc)
        distances = np.linalg.norm(vectors, axis=1)
        if min(np.count_nonzero(i == a) for a in range(n_atoms)) >= k:
            radius = [np.sort(distances[i == a])[k - 1] * (1 + tolerance) for a in range(n_atoms)]
            if max(radius) < cutoff:
                break
        cutoff *= 1.5
    keep = distances <= np.maximum(np.take(radius, i), np.take(radius, j))
    return i[keep], j[keep], shift[keep], vectors[keep]


def assert_equal(neighbors, expected):
    i, j, shift, vectors = expected
    np.testing.assert_array_equal(neighbors.edge_index.numpy(), np.stack([i, j]))
    np.testing.assert_array_equal(neighbors.cell_shift.numpy(), shift)
    np.testing.assert_allclose(neighbors.edge_vec.numpy(), vectors, rtol=0, atol=1e-8)
    counts = np.bincount(i, minlength=len(neighbors.row_ptr) - 1)
    np.testing.assert_array_equal(neighbors.row_ptr.numpy(), np.concatenate([[0], np.cumsum(counts)]))


@st.composite
def crystals(draw, max_atoms=4):
    """Cells of aspect up to 100, skewed or not, with atoms up to two cells outside."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = 2.0 * np.array(draw(st.tuples(*[st.floats(1, 100)] * 3))) ** draw(st.sampled_from([0.2, 1.0]))
    cell = np.diag(lengths) + np.tril(rng.uniform(-1, 1, (3, 3)) * draw(st.sampled_from([0, 1, 6])), -1)
    n_atoms = draw(st.integers(1, max_atoms))
    frac = rng.uniform(-2, 3, (n_atoms, 3))
    if draw(st.booleans()):
        frac = np.round(frac * 4) / 4  # special positions, equal distances
    return Crystal(rng.integers(1, 90, n_atoms), frac, cell)


@settings(max_examples=150, deadline=None)
@given(crystals(), st.floats(0.5, 9.0), st.tuples(st.booleans(), st.booleans(), st.booleans()), st.booleans())
def test_radius_mode_finds_what_trying_all_images_finds(crystal, cutoff, pbc, half):
    expected = all_pairs(crystal, cutoff, pbc)
    close = all_pairs(crystal, 0.02, pbc)[0]
    on_the_edge = len(all_pairs(crystal, cutoff + 1e-9, pbc)[0]) - len(
        all_pairs(crystal, cutoff - 1e-9, pbc)[0]
    )
    assume(not len(close) and not on_the_edge)
    if half:
        i, j, shift, vectors = expected
        keep = [a < b or (a == b and tuple(s) > (0, 0, 0)) for a, b, s in zip(i, j, shift, strict=True)]
        expected = i[keep], j[keep], shift[keep], vectors[keep]
    assert_equal(neighbor_list(batch_of(crystal, pbc=pbc), cutoff=cutoff, half=half), expected)


@settings(max_examples=100, deadline=None)
@given(crystals(), st.integers(1, 30))
def test_nearest_mode_finds_what_trying_all_images_finds(crystal, k):
    assume(not len(all_pairs(crystal, 0.02)[0]))
    expected = whole_shells(crystal, k)
    assume(len(expected[0]) == len(whole_shells(crystal, k, tolerance=1.01e-4)[0]))
    assert_equal(neighbor_list(batch_of(crystal), max_neighbors=k), expected)


@settings(max_examples=40, deadline=None)
@given(st.floats(1, 10), st.floats(15, 60), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_angles_down_to_a_degree(degrees, length, n_atoms, seed):
    rng = np.random.default_rng(seed)
    angle = math.radians(degrees)
    cell = np.array([[length, 0, 0], [math.cos(angle) * length, math.sin(angle) * length, 0], [1, 2, 6]])
    crystal = Crystal(np.full(n_atoms, 6), rng.uniform(-1, 2, (n_atoms, 3)), cell[rng.permutation(3)])
    assume(not len(all_pairs(crystal, 0.02)[0]))
    cutoff = rng.uniform(2, 5)
    assert_equal(neighbor_list(batch_of(crystal), cutoff=cutoff), all_pairs(crystal, cutoff))


def large_crystal(n_atoms, seed=0):
    """Atoms at random places of a grid in a skewed cell, 11 Å^3 each, some of them outside."""
    rng = np.random.default_rng(seed)
    side = math.ceil(n_atoms ** (1 / 3))
    cell = np.array([[9.0, 0, 0], [4.0, 11.0, 0], [-7.0, 3.0, 8.0]]) * (11 * n_atoms / 792) ** (1 / 3)
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3)[:n_atoms]
    frac = (grid + rng.uniform(0, 0.6, (n_atoms, 3))) / side + rng.integers(0, 2, (n_atoms, 3))
    return Crystal(np.full(n_atoms, 6), frac, cell)


@pytest.mark.parametrize(
    "pbc", [(True, True, True), (True, True, False), (False, True, False), (False, False, False)]
)
@pytest.mark.parametrize("n_atoms", [70, 500])
def test_large_cells(n_atoms, pbc):
    crystal = large_crystal(n_atoms)
    if n_atoms == 500 or not all(pbc):
        crystal = crystal._replace(frac=crystal.frac % 1)
    batch = batch_of(crystal, pbc=pbc)
    for cutoff in (1.2, 4.0, 9.0) if n_atoms == 70 else (1.2, 2.5):  # shorter and longer than the cell
        assert_equal(neighbor_list(batch, cutoff=cutoff), all_pairs(crystal, cutoff, pbc))
    if n_atoms == 70:
        assert_equal(neighbor_list(batch, max_neighbors=12), whole_shells(crystal, 12, pbc=pbc))


MODES = {
    "cutoff": {"cutoff": 5.0},
    "half": {"cutoff": 4.0, "half": True},
    "nearest": {"max_neighbors": 25, "shell_margin": True},
    "many nearest": {"max_neighbors": 300},
}


def assert_same(one, other):
    for name, value in vars(one).items():
        assert (value is None and getattr(other, name) is None) or torch.equal(value, getattr(other, name)), (
            name
        )


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512"])
def test_every_vector_unit_has_the_same_result(kernels, mode):
    widest = _C.vector_kernels()
    batch = batch_of(*[c for _, c in prototypes(24)][::3], large_crystal(1500))
    expected = neighbor_list(batch, **mode)
    try:
        _C.use_vector_kernels(kernels)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        assert _C.vector_kernels() == kernels
        assert_same(neighbor_list(batch, **mode), expected)
    finally:
        _C.use_vector_kernels(widest)


def test_a_list_outlives_the_next_calls():
    """Memory is used again, but not while someone holds it."""
    batch = batch_of(*[c for _, c in prototypes(40)])
    first = neighbor_list(batch, cutoff=6.0)
    kept = {name: value.clone() for name, value in vars(first).items() if value is not None}
    view = neighbor_list(batch, cutoff=6.0).edge_vec[1:]
    for cutoff in (5.0, 6.0, 7.0):
        neighbor_list(batch, cutoff=cutoff)
    assert all(torch.equal(getattr(first, name), value) for name, value in kept.items())
    assert torch.equal(view, first.edge_vec[1:])


def test_ten_thousand_atoms():
    silicon = Crystal(
        np.full(8, 14),
        np.concatenate(
            [
                np.array([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]]),
                np.array([[1, 1, 1], [1, 3, 3], [3, 1, 3], [3, 3, 1]]),
            ]
        )
        / 4,
        5.43 * np.eye(3),
    )
    neighbors = neighbor_list(batch_of(supercell(silicon, (11, 11, 11))), max_neighbors=16)
    assert neighbors.row_ptr.diff().unique().tolist() == [16]  # 4 + 12: two whole shells


@pytest.mark.parametrize("half", [False, True])
def test_a_shell_right_on_the_cutoff_counts(half):
    share = 2 if half else 1
    assert neighbor_list(batch_of(CUBIC), cutoff=3.0, half=half).edge_vec.shape[0] == 6 // share
    assert neighbor_list(batch_of(CUBIC), cutoff=math.nextafter(3.0, 0), half=half).edge_vec.shape[0] == 0


@pytest.mark.parametrize("crystal", [CUBIC, supercell(CUBIC, (3, 2, 1)), supercell(CUBIC, (7, 8, 9))])
def test_pairs_within_rounding_of_the_cutoff_are_decided_in_double_precision(crystal):
    n_atoms = len(crystal.frac)
    points = 3.0 * (np.indices((7, 7, 7)).reshape(3, -1).T - 3)
    for n in (1, 2, 3, 5, 6, 8):  # d^2 = 9 n, without rounding
        middle = 3.0 * math.sqrt(n)
        for cutoff in (math.nextafter(middle, 0), middle, math.nextafter(middle, 9), middle * (1 - 1e-7)):
            within = np.count_nonzero((points**2).sum(1) <= cutoff * cutoff) - 1
            assert neighbor_list(batch_of(crystal), cutoff=cutoff).edge_vec.shape[0] == within * n_atoms


def test_shells_stay_whole_under_noise():
    rng = np.random.default_rng(0)
    for _ in range(20):
        noisy = CUBIC._replace(cell=CUBIC.cell + 1e-5 * rng.normal(size=(3, 3)))
        for k, shell in ((1, 6), (6, 6), (7, 18), (25, 26)):
            assert neighbor_list(batch_of(noisy), max_neighbors=k).edge_vec.shape[0] == shell


def test_every_edge_has_its_reverse_once_and_exactly_opposite():
    for crystals_of_a_kind in (
        [c for _, c in prototypes(30)],
        [c for _, c in prototypes() if len(c.frac) > 64],
    ):
        found = neighbor_list(batch_of(*crystals_of_a_kind), max_neighbors=12)
        i, j = found.edge_index.numpy()
        shift, vectors = found.cell_shift.numpy(), found.edge_vec.numpy()
        forward = np.lexsort((*shift.T[::-1], j, i))
        np.testing.assert_array_equal(forward, np.arange(len(i)))
        backward = np.lexsort((*-shift.T[::-1], i, j))
        np.testing.assert_array_equal(np.stack([j, i])[:, backward], np.stack([i, j]))
        np.testing.assert_array_equal(-shift[backward], shift)
        np.testing.assert_array_equal(-vectors[backward], vectors)
        edges = np.column_stack([i, j, shift])
        assert (edges[1:] != edges[:-1]).any(1).all()


def test_vectors_follow_from_indices_and_shifts():
    rng = np.random.default_rng(1)
    crystals = [described_anew(c, rng) for _, c in prototypes(20)]
    batch = batch_of(*crystals)
    found = neighbor_list(batch, max_neighbors=8)
    crystal = torch.repeat_interleave(torch.arange(len(batch)), batch.num_atoms)
    positions = torch.einsum("na,nab->nb", batch.frac_coords, batch.cell[crystal])
    i, j = found.edge_index
    shifts = torch.einsum("ea,eab->eb", found.cell_shift.double(), batch.cell[crystal[i]])
    torch.testing.assert_close(found.edge_vec, positions[j] - positions[i] + shifts, rtol=0, atol=1e-9)


def test_other_descriptions_have_the_same_distances():
    rng = np.random.default_rng(2)
    for _, crystal in prototypes(12):
        same = [crystal, described_anew(crystal, rng), described_anew(supercell(crystal, (2, 1, 1)), rng)]
        for mode in ({"cutoff": 5.0 + rng.random()}, {"max_neighbors": 25}):
            found = neighbor_list(batch_of(*same), **mode)
            first = np.cumsum([0] + [len(c.frac) for c in same])
            d = [
                np.sort(np.linalg.norm(found.edge_vec[found.row_ptr[a] : found.row_ptr[b]].numpy(), axis=1))
                for a, b in itertools.pairwise(first)
            ]
            np.testing.assert_allclose(d[1], d[0], atol=1e-9)
            np.testing.assert_allclose(d[2], np.repeat(d[0], 2), atol=1e-9)


def test_very_skewed_cells_have_the_neighbours_of_the_reduced_one():
    skewed = CUBIC._replace(cell=np.array([[1, 0, 0], [100, 1, 0], [-70, 150, 1]]) @ CUBIC.cell)
    found = neighbor_list(batch_of(skewed), cutoff=3.0)
    assert found.edge_vec.shape[0] == 6
    np.testing.assert_allclose(found.cell_shift.double().numpy() @ skewed.cell, found.edge_vec, atol=1e-9)


def test_a_molecule_has_no_images():
    water = Crystal(
        np.array([8, 1, 1]), np.array([[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]]) / 4.0, 4.0 * np.eye(3)
    )
    found = neighbor_list(batch_of(water, pbc=[False] * 3), cutoff=100.0)
    assert found.edge_index.T.tolist() == [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]
    assert not found.cell_shift.any()
    found = neighbor_list(batch_of(water, pbc=[False] * 3), max_neighbors=2, shell_margin=True)
    assert found.edge_vec.shape[0] == 6
    # No distance lies nearer the boundary than the k-th itself.
    np.testing.assert_allclose(found.shell_margin, 1e-4, rtol=1e-6)


def test_shell_margin_is_the_distance_of_the_nearest_shell_from_the_boundary():
    # Neighbours at 3 (along a), 3 (1 + 1.7e-4) (along b) and 3 (1 + 5e-4).
    cell = np.diag([3.0, 3.0 * (1 + 1.7e-4), 3.0 * (1 + 5e-4)])
    found = neighbor_list(batch_of(CUBIC._replace(cell=cell)), max_neighbors=1, shell_margin=True)
    assert found.edge_vec.shape[0] == 2
    np.testing.assert_allclose(found.shell_margin, 0.7e-4, rtol=1e-6)
    assert neighbor_list(batch_of(CUBIC), max_neighbors=1).shell_margin is None
    # The next shell is far outside: only the k-th distance itself is near the boundary.
    far = neighbor_list(batch_of(CUBIC), max_neighbors=6, shell_margin=True)
    np.testing.assert_allclose(far.shell_margin, 1e-4, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_result_does_not_depend_on_threads(mode):
    # The large crystal is worked on by all threads together.
    batch = batch_of(*[c for _, c in prototypes(24)][::3], large_crystal(3000), CUBIC)
    one, many = (neighbor_list(batch, threads=n, **mode) for n in (1, 7))
    assert_same(one, many)


def test_the_first_crystal_at_fault_is_named_whatever_the_threads():
    twice = large_crystal(3000)
    twice = twice._replace(frac=np.concatenate([twice.frac[:-1], twice.frac[:1]]))
    flat = CUBIC._replace(cell=np.diag([3, 3, 1e-9]))
    for first, second, message in ((twice, flat, "atom 0 and atom 2999 are"), (flat, twice, "volume")):
        batch = batch_of(*[CUBIC] * 9, first, *[CUBIC] * 9, second)
        for threads in (1, 3):
            with pytest.raises(ValueError, match=f"structure '9': .*{message}"):
                neighbor_list(batch, cutoff=4.0, threads=threads)


def test_no_crystals_have_no_neighbours():
    empty = CrystalBatch.from_arrays([], np.zeros((0, 3)), np.zeros((0, 3, 3)), [])
    found = neighbor_list(empty, cutoff=5.0)
    assert found.edge_index.shape == (2, 0)
    assert found.row_ptr.tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"cutoff": 5.0, "max_neighbors": 12}, "exactly one"),
        ({"cutoff": 0.0}, r"cutoff = 0.0 Å; it must be positive and at most 10\^7"),
        ({"cutoff": -1.0}, "cutoff = -1.0"),
        ({"cutoff": math.inf}, "cutoff = inf"),
        ({"cutoff": 1.1e7}, "cutoff = 11000000.0"),
        ({"cutoff": math.nan}, "cutoff = nan"),
        ({"max_neighbors": 0}, r"max_neighbors = 0; it must be a whole number from 1 to 10\^9"),
        ({"max_neighbors": 2.5}, "max_neighbors = 2.5; it must be a whole number"),
        ({"max_neighbors": 10**20}, "max_neighbors = 100000000000000000000; it must be a whole number"),
        ({"max_neighbors": 12, "shell_tolerance": -1e-4}, "shell_tolerance = -0.0001"),
        ({"max_neighbors": 12, "shell_tolerance": math.nan}, "shell_tolerance = nan"),
        ({"cutoff": 5.0, "shell_margin": True}, "shell_margin needs max_neighbors"),
        ({"cutoff": 5.0, "threads": 0}, "threads = 0"),
        ({"cutoff": 5.0, "threads": 10**20}, "threads = 100000000000000000000"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        neighbor_list(batch_of(CUBIC), **arguments)


@pytest.mark.parametrize(
    ("field", "dtype"),
    [
        ("numbers", "int32"),
        ("frac_coords", "float32"),
        ("cell", "float32"),
        ("batch_ptr", "int32"),
        ("pbc", "uint8"),
    ],
)
def test_tensors_of_another_type_are_refused(field, dtype):
    batch = batch_of(CUBIC)
    changed = replace(batch, **{field: getattr(batch, field).to(getattr(torch, dtype))})
    with pytest.raises(
        TypeError, match=rf"crystals\.{field} is torch\.{dtype}, .* CrystalBatch\.from_arrays"
    ):
        neighbor_list(changed, cutoff=5.0)


@contextmanager
def address_space_of_this_and(n_bytes):
    """Let the process take so much more memory, and no more."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("limits the address space as Linux counts it")
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_more_threads_than_the_system_has_room_for():
    """There are no more threads than cores: with one a crystal the stacks would not fit."""
    batch = batch_of(*[CUBIC] * 4000)
    expected = neighbor_list(batch, cutoff=3.5, threads=1)
    with address_space_of_this_and((os.cpu_count() + 8) * 2**27):
        found = neighbor_list(batch, cutoff=3.5, threads=10**6)
    assert torch.equal(found.edge_vec, expected.edge_vec)


def with_cell(cell):
    return CUBIC._replace(cell=np.array(cell, dtype=float))


def with_frac(*frac):
    return Crystal(np.full(len(frac), 84), np.array(frac, dtype=float), 3.0 * np.eye(3))


FAULTS = {
    "nan cell": (with_cell(np.diag([3, np.nan, 3])), "component 1 of lattice vector b is nan"),
    "infinite cell": (with_cell(np.diag([3, 3, np.inf])), "component 2 of lattice vector c is inf"),
    "nan position": (
        with_frac([0, 0, 0], [0.5, np.nan, 0]),
        "atom 1: fractional coordinate b is nan; give a finite number",
    ),
    "far position": (with_frac([0, 0, 1e9]), r"atom 0: fractional coordinate c is 1e\+09; wrap"),
    "no volume": (with_cell([[3, 0, 0], [0, 3, 0], [3, 3, 0]]), r"volume of 0 Å\^3, \(nearly\) zero"),
    "flat": (with_cell(np.diag([10, 10, 1e-11])), r"volume of 1e-09 Å\^3, \(nearly\) zero"),
    "tiny": (with_cell(1e-3 * np.eye(3)), r"volume of 1e-09 Å\^3, \(nearly\) zero"),
    "long": (
        with_cell(np.diag([3, 1.1e6, 3])),
        r"component 1 of lattice vector b is 1\.1e\+06; give lengths in Å, at most 1e\+06",
    ),
    "huge": (with_cell(1e200 * np.eye(3)), r"component 0 of lattice vector a is 1e\+200; give"),
    "needle": (with_cell(np.diag([1e6, 1, 0.1])), "less skewed cell"),
    "own image": (with_cell(np.diag([10, 30, 0.005])), "each atom is 0.005 Å from its own image"),
    "coincident": (
        with_frac([0.5, 0, 0], [0.1, 0.2, 0.3], [2.1, 0.2, -0.699]),
        "atom 1 and atom 2 are 0.003 Å apart .* remove one",
    ),
}


@pytest.mark.parametrize("mode", [{"cutoff": 5.0}, {"max_neighbors": 12}], ids=["cutoff", "max_neighbors"])
@pytest.mark.parametrize(("crystal", "message"), FAULTS.values(), ids=FAULTS)
def test_crystals_at_fault_are_named(crystal, message, mode):
    good = batch_of(CUBIC)
    batch = batch_of(CUBIC, crystal, crystal)
    batch = CrystalBatch(**{**vars(batch), "ids": ("first", "second", "third")})
    assert neighbor_list(good, **mode).edge_vec.shape[0] > 0
    with pytest.raises(ValueError, match=f"structure 'second': .*{message}"):
        neighbor_list(batch, threads=3, **mode)


def test_searches_too_large_to_be_meant_are_refused_at_once():
    with pytest.raises(
        ValueError, match=r"structure '0': too many images: within 1e\+03 Å .* lower the cutoff"
    ):
        neighbor_list(batch_of(CUBIC), cutoff=1000.0)
    with pytest.raises(ValueError, match=r"too many images: .* lower max_neighbors"):
        neighbor_list(batch_of(CUBIC), max_neighbors=10**9)


@pytest.mark.parametrize(
    ("crystal", "cutoff", "reason"),
    [
        (
            with_cell(np.diag([0.02, 0.02, 1e4])),
            20.5,
            "there are about 4.21e+06 images of the cell (allowed 4e+06)",
        ),
        (supercell(CUBIC, (10, 10, 10)), 230.0, "an atom has about 1.89e+06 neighbours (allowed 1e+06)"),
        (supercell(CUBIC, (10, 10, 10)), 88.0, "the crystal has about 1.06e+08 edges (allowed 1e+08)"),
    ],
)
def test_the_limit_that_a_search_passes_is_named(crystal, cutoff, reason):
    with pytest.raises(ValueError, match=f"within {cutoff:.3g} Å {re.escape(reason)}; lower the cutoff"):
        neighbor_list(batch_of(crystal), cutoff=cutoff)


def test_a_search_that_memory_ends_names_the_structure():
    # 10^8 pairs, 4 bytes each until they are written.
    batch = batch_of(CUBIC, supercell(CUBIC, (16, 16, 16)))
    with (
        address_space_of_this_and(2**24),
        pytest.raises(
            ValueError,
            match=r"structure '1': not enough memory for 4096 atoms with about 2\.\d*e\+04 neighbours each "
            r"within 52 Å, .* lower the cutoff",
        ),
    ):
        neighbor_list(batch, cutoff=52.0, threads=1)


def test_a_list_that_memory_ends_names_its_size():
    batch = batch_of(*[supercell(CUBIC, (8, 8, 8))] * 20)
    with (
        address_space_of_this_and(2**27),
        pytest.raises(MemoryError, match=r"the list of \d{8} edges; build"),
    ):
        neighbor_list(batch, cutoff=19.0, threads=1)


def with_atoms_far_away(n_atoms, distances):
    """A crowd of atoms in the middle of nowhere, and others alone at so many Å along the diagonal."""
    crowd = large_crystal(n_atoms)
    positions = np.concatenate([crowd.positions, np.array(distances)[:, None] / 3**0.5 * np.ones(3)])
    return Crystal(np.full(len(positions), 6), positions / 1000.0, 1000.0 * np.eye(3))


@pytest.mark.parametrize("pbc", [(False, False, False), (True, False, False)])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_atoms_far_away_search_on_alone(k, pbc):
    crystal = with_atoms_far_away(60, [60.0, 150.0, 151.0, 400.0])
    expected = whole_shells(crystal, k, pbc=pbc)
    for threads in (1, 3):
        assert_equal(neighbor_list(batch_of(crystal, pbc=pbc), max_neighbors=k, threads=threads), expected)
    i, j, shift, vectors = expected
    keep = [a < b or (a == b and tuple(s) > (0, 0, 0)) for a, b, s in zip(i, j, shift, strict=True)]
    half = neighbor_list(batch_of(crystal, pbc=pbc), max_neighbors=k, half=True)
    assert_equal(half, (i[keep], j[keep], shift[keep], vectors[keep]))


def test_atoms_far_away_cost_the_others_nothing():
    """Pairs of 10,000 atoms would take 800 MB."""
    crystal = with_atoms_far_away(10_000, [900.0])
    batch = batch_of(crystal, pbc=[False] * 3)
    with address_space_of_this_and(2**28):
        found = neighbor_list(batch, max_neighbors=25, threads=1)
    alone = neighbor_list(batch_of(large_crystal(10_000), pbc=[False] * 3), max_neighbors=25)
    n_edges = found.edge_vec.shape[0]
    assert found.row_ptr[-1] - found.row_ptr[-2] == 25
    assert n_edges == alone.edge_vec.shape[0] + 2 * 25
    distance = found.edge_vec[-25:].norm(dim=1).max()
    positions = torch.from_numpy(crystal.positions)
    assert distance == (positions[:-1] - positions[-1]).norm(dim=1).kthvalue(25).values


def test_wires_and_long_cells_are_searched_as_far_as_they_need():
    wire = with_cell(np.diag([100.0, 4.0, 4.0]))
    pbc = (True, False, False)
    assert_equal(neighbor_list(batch_of(wire, pbc=pbc), max_neighbors=30), whole_shells(wire, 30, pbc=pbc))
    long = with_frac([0, 0, 0.1], [0.5, 0.5, 0.1001])._replace(cell=np.diag([3.0, 3.0, 3000.0]))
    assert_equal(neighbor_list(batch_of(long), cutoff=5.0), all_pairs(long, 5.0))


@pytest.mark.parametrize("length", [1e3, 1e6])
def test_very_large_cells(length):
    fcc = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    crystal = Crystal(np.full(4, 29), fcc, length * np.eye(3))
    for mode, n_edges in (
        ({"max_neighbors": 12}, 12),
        ({"cutoff": 1.01 * length}, 18),
        ({"cutoff": 0.7 * length}, 0),
    ):
        assert neighbor_list(batch_of(crystal), **mode).row_ptr.diff().tolist() == [n_edges] * 4


def test_atoms_too_far_away_where_not_periodic_are_named():
    slab = with_frac([0, 0, 0], [0, 0, 20.0])._replace(cell=np.diag([3.0, 3.0, 1e5]))
    with pytest.raises(
        ValueError, match="structure '0': atom 1: fractional coordinate c is 20; move it nearer"
    ):
        neighbor_list(batch_of(slab, pbc=(True, True, False)), cutoff=5.0)


def test_gradients_are_refused():
    batch = batch_of(CUBIC)
    moving = replace(batch, frac_coords=batch.frac_coords.requires_grad_())
    with pytest.raises(ValueError, match=r"crystals\.frac_coords requires a gradient, .* detach it"):
        neighbor_list(moving, cutoff=3.0)


def test_too_few_atoms_without_periodicity():
    pair = with_frac([0, 0, 0], [0.4, 0, 0])
    with pytest.raises(
        ValueError, match="only 1 neighbours, fewer than max_neighbors = 2; lower max_neighbors"
    ):
        neighbor_list(batch_of(pair, pbc=[False] * 3), max_neighbors=2)
    assert neighbor_list(batch_of(pair, pbc=[False, False, True]), max_neighbors=2).edge_vec.shape[0] > 0


def test_atoms_crowded_in_a_small_part_of_the_cell():
    """Some are alone: searches begin with the radius of the crowd and have to grow by far."""
    grid = np.stack(np.meshgrid(*3 * [np.arange(14)], indexing="ij"), axis=-1).reshape(-1, 3)
    alone = [[10, 10, 10], [20, 10, 10], [80, 80, 80], [30, 50, 51]]
    frac = np.concatenate([0.0002 * grid + 0.5, np.array(alone) / 100])
    found = neighbor_list(batch_of(Crystal(np.full(len(frac), 6), frac, 100 * np.eye(3))), max_neighbors=6)
    difference = frac[:, None] - frac
    distance = np.linalg.norm(100 * (difference - np.round(difference)), axis=-1)
    limit = np.sort(distance, axis=1)[:, 6] * (1 + SHELL_TOLERANCE)
    kept = (distance <= np.maximum(limit[:, None], limit)) & ~np.eye(len(frac), dtype=bool)
    assert found.row_ptr.diff().tolist() == kept.sum(axis=1).tolist()
    assert found.edge_index.T.tolist() == np.argwhere(kept).tolist()
