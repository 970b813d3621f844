"""What physics demands of a prediction: no choice of cell, axes or labels may show in it.

The network has random weights and the batch statistics of the crystals below, so that it is sensitive to what
differs between them. Graphs are built in float64; the network runs in float32, where predictions must agree
to 2e-5 of their size.
"""

import numpy as np
import pytest
import torch
from e3nn import o3
from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY
from pymatgen.core import Lattice, Structure
from scipy.spatial.transform import Rotation

from mgt_fast import MGT, CrystalBatch, MGTConfig, build_graph
from mgt_fast.layers import GraphIndex
from mgt_fast.model import inverse_length

CONFIG = MGTConfig(channels=48, num_scalars=16, num_vectors=4, expert_hidden=16)
RTOL = 2e-5

# Cubic to triclinic, polar and not, one to some twenty atoms.
PROTOTYPES = [
    AFLOW_PROTOTYPE_LIBRARY[i]["snl"].structure for i in (0, 5, 20, 57, 100, 122, 150, 180, 210, 240)
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = MGT(CONFIG)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 1.0  # one batch decides
    with torch.no_grad():
        model.train()(build_graph(CrystalBatch.from_structures(CRYSTALS)).to(dtype=torch.float32))
    return model.eval()


def run(model, *structures, dtype=torch.float32):
    graph = build_graph(CrystalBatch.from_structures(structures)).to(dtype=dtype)
    with torch.no_grad():
        return model.to(dtype)(graph)


def assert_same(model, structures, others):
    a, b = run(model, *structures), run(model, *others)
    for name in ("se3_pool", "so3_pool", "prediction", "contributions"):
        x, y = getattr(a, name), getattr(b, name)
        error = (x - y).norm(dim=1) / x.norm(dim=1)
        assert error.max() < RTOL, (name, error)


def _perturbed(structure, seed):
    rng = np.random.default_rng(seed)
    shifts = rng.normal(0, 0.1, (len(structure), 3))
    return Structure(
        structure.lattice, structure.species, structure.cart_coords + shifts, coords_are_cartesian=True
    )


CRYSTALS = PROTOTYPES + [_perturbed(s, i) for i, s in enumerate(PROTOTYPES)]


@pytest.mark.parametrize("view", ["se3_pool", "so3_pool"])
def test_embeddings_differ_between_crystals(model, view):
    # Without this every invariance below could hold for a constant.
    pool = getattr(run(model, *PROTOTYPES), view)
    gaps = torch.cdist(pool, pool) + torch.eye(len(PROTOTYPES)) * pool.norm()
    assert gaps.min() > 100 * RTOL * pool.norm(dim=1).max()


def test_rotation(model):
    rotations = Rotation.random(len(CRYSTALS), random_state=0).as_matrix()
    turned = [
        Structure(Lattice(s.lattice.matrix @ r.T), s.species, s.frac_coords)
        for s, r in zip(CRYSTALS, rotations, strict=True)
    ]
    assert_same(model, CRYSTALS, turned)


def test_translation_and_permutation(model):
    rng = np.random.default_rng(0)
    moved = []
    for s in CRYSTALS:
        order = rng.permutation(len(s))
        coords = s.frac_coords[order] + rng.random(3) + rng.integers(-2, 3, (len(s), 3))
        moved.append(Structure(s.lattice, [s.species[i] for i in order], coords))
    assert_same(model, CRYSTALS, moved)


def unimodular(rng):
    matrix = np.eye(3, dtype=int)
    for _ in range(6):
        i, j = rng.choice(3, 2, replace=False)
        shear = np.eye(3, dtype=int)
        shear[i, j] = rng.integers(-2, 3)
        matrix = shear @ matrix
    return matrix


def test_change_of_cell(model):
    rng = np.random.default_rng(0)
    others = []
    for s in CRYSTALS:
        matrix = unimodular(rng)
        others.append(
            Structure(Lattice(matrix @ s.lattice.matrix), s.species, s.cart_coords, coords_are_cartesian=True)
        )
    assert_same(model, CRYSTALS, others)


@pytest.mark.parametrize("scaling", [(2, 1, 1), (1, 2, 2), [[1, 1, 0], [-1, 1, 0], [0, 0, 1]]])
def test_supercell(model, scaling):
    small = [s for s in CRYSTALS if len(s) < 13]
    assert len(small) >= 8
    assert_same(model, small, [s.copy().make_supercell(scaling, in_place=False) for s in small])


def test_batch_composition_does_not_matter(model):
    together = run(model, *CRYSTALS).prediction
    alone = torch.cat([run(model, s).prediction for s in CRYSTALS])
    torch.testing.assert_close(together, alone, rtol=RTOL, atol=1e-6)


def test_tensor_features_are_equivariant(model):
    rotation = torch.tensor(Rotation.random(random_state=5).as_matrix())
    irreps = o3.Irreps(f"{CONFIG.num_scalars}x0e + {CONFIG.num_vectors}x1o + {CONFIG.num_vectors}x2e")
    graph = build_graph(CrystalBatch.from_structures(CRYSTALS[:4]))
    encoder = model.double().so3_graph_encoder

    def features(edge_vec):
        edge = encoder.edge_embedding(inverse_length(edge_vec))
        node = encoder.atom_embedding(graph.numbers)
        parts = encoder.equi_update[0].features(node, edge, edge_vec, GraphIndex(graph))
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    with torch.no_grad():
        before, after = features(graph.edge_vec), features(graph.edge_vec @ rotation.t())
    assert before[:, CONFIG.num_scalars :].norm() > 0.1  # there is something to rotate
    torch.testing.assert_close(after, before @ irreps.D_from_matrix(rotation).t(), rtol=1e-6, atol=1e-7)


def test_polytypes_with_equal_neighbourhoods_differ(model):
    """Cubic and hexagonal diamond: all atoms have four neighbours, distances and angles are equal."""
    a = 3.567
    cubic = Structure.from_spacegroup("Fd-3m", Lattice.cubic(a), ["C"], [[0, 0, 0]]).get_primitive_structure()
    edge = a / 2**0.5
    hexagonal = Structure(
        Lattice.hexagonal(edge, edge * (8 / 3) ** 0.5),
        ["C"] * 4,
        [[1 / 3, 2 / 3, 1 / 16], [2 / 3, 1 / 3, -1 / 16], [1 / 3, 2 / 3, 7 / 16], [2 / 3, 1 / 3, 9 / 16]],
    )
    graph = build_graph(CrystalBatch.from_structures([cubic, hexagonal]), max_neighbors=4)
    assert torch.equal(graph.row_ptr.diff(), torch.full((6,), 4))
    torch.testing.assert_close(graph.edge_vec.norm(dim=1), torch.full((24,), a * 3**0.5 / 4).double())
    with torch.no_grad():
        out = model.float()(graph.to(dtype=torch.float32))
    difference = (out.se3_pool[0] - out.se3_pool[1]).norm() / out.se3_pool[0].norm()
    assert difference > 1e-3
    assert (out.prediction[0] - out.prediction[1]).abs() > 1e-4 * out.prediction.abs().max()


def mirror(structure):
    return Structure(Lattice(structure.lattice.matrix * [-1, 1, 1]), structure.species, structure.frac_coords)


QUARTZ = Structure.from_spacegroup(
    "P3_221", Lattice.hexagonal(4.916, 5.4054), ["Si", "O"], [[0.4697, 0, 0], [0.4135, 0.2669, 0.1191]]
)
ZINCBLENDE = Structure.from_spacegroup("F-43m", Lattice.cubic(5.65), ["Ga", "As"], [[0, 0, 0], [0.25] * 3])


def test_mirror_images(model):
    """The SO(3) view keeps parity even, so it cannot tell mirror images apart; the SE(3) view can, but only
    where they differ by more than a rotation."""
    assert_same(model, [ZINCBLENDE], [mirror(ZINCBLENDE)])
    left, right = run(model, QUARTZ), run(model, mirror(QUARTZ))
    torch.testing.assert_close(left.so3_pool, right.so3_pool, rtol=RTOL, atol=RTOL)
    assert (left.se3_pool - right.se3_pool).norm() / left.se3_pool.norm() > 100 * RTOL
