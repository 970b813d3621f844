"""The CUDA kernel for lattice frames without a GPU: its source runs on the host, block by block.

Frames must equal the host's bit for bit: both add the same numbers in the same order.
"""

import numpy as np
import pytest
import torch
from crystals import Crystal, batch_of, described_anew, prototypes, supercell
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_frame import LATTICES, random_motif, symmetry_operations
from test_neighbor_list import CUBIC, all_pairs
from test_neighbor_list import crystals as crystals_of_any_shape
from test_neighbors_cuda import PBC, EmulatedModule

from mgt_fast import build_graph, frames_cuda, neighbors_cuda
from mgt_fast.data import CrystalDataset


@pytest.fixture(autouse=True, scope="module")
def kernels():
    with pytest.MonkeyPatch.context() as patch:
        module = EmulatedModule()
        patch.setattr(frames_cuda, "KERNELS", module)
        yield module


def on_device(batch, graph, **given):
    return frames_cuda.lattice_frames(batch, graph.edge_index, graph.edge_vec, graph.row_ptr, **given)


def assert_same_frames(batch, max_neighbors=12):
    graph = build_graph(batch, max_neighbors=max_neighbors)
    assert torch.equal(on_device(batch, graph), graph.frame)


def test_the_kernel_runs(kernels):
    kernels.launched.clear()
    assert_same_frames(batch_of(CUBIC))
    assert kernels.launched == ["choose_frames"]


def test_bundled_crystals():
    dataset = CrystalDataset.open(None)
    assert_same_frames(dataset.gather(np.arange(0, len(dataset), 25)), max_neighbors=25)


@pytest.mark.parametrize("displacement", [0.0, 1e-4, 0.05])
def test_prototypes_described_in_several_ways(displacement):
    rng = np.random.default_rng(0)
    crystals = []
    for _, crystal in list(prototypes(max_atoms=24))[:: 3 if displacement else 1]:
        moved = displacement * rng.normal(size=crystal.frac.shape) @ np.linalg.inv(crystal.cell)
        crystal = crystal._replace(frac=crystal.frac + moved)
        crystals += [crystal, described_anew(supercell(crystal, (2, 1, 1)), rng)]
    assert_same_frames(batch_of(*crystals))


@pytest.mark.parametrize("pbc", [(True, True, False), (False, True, False), (False, False, False)])
def test_slabs_wires_and_molecules(pbc):
    rng = np.random.default_rng(1)
    crystals = []
    for cell in LATTICES.values():
        motif = random_motif(cell, symmetry_operations(cell), rng)
        crystals += [supercell(motif, (2, 2, 2)), described_anew(supercell(motif, (1, 3, 2)), rng)]
    assert_same_frames(batch_of(*crystals, pbc=pbc), max_neighbors=5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(crystals_of_any_shape(), st.integers(1, 30), PBC)
def test_any_cell(crystal, k, pbc):
    assume(not len(all_pairs(crystal, 0.02, pbc)[0]) and (any(pbc) or k < len(crystal.frac)))
    assert_same_frames(batch_of(crystal, pbc=pbc), k)


def test_more_atoms_than_threads():
    """Every atom of the one element could start a translation: in a supercell all do, shaken none."""
    rng = np.random.default_rng(2)
    perfect = described_anew(supercell(CUBIC, (6, 5, 7)), rng)
    shaken = perfect._replace(frac=perfect.frac + 0.02 * rng.normal(size=perfect.frac.shape))
    assert_same_frames(batch_of(perfect, shaken))
    frame = build_graph(batch_of(perfect), max_neighbors=12).frame
    torch.testing.assert_close(frame.norm(dim=2), torch.full((1, 3), 3.0, dtype=torch.float64))


def test_rows_longer_than_a_block_of_edges():
    pair = Crystal(np.array([6, 8]), np.array([[0, 0, 0], [0.3, 0.2, 0.1]]), 3.0 * np.eye(3))
    assert_same_frames(batch_of(pair), max_neighbors=2500)


def test_needles():
    """The tolerance covers lattice vectors here: it has to shrink until bases are told apart."""
    needles = [CUBIC._replace(cell=np.diag([3.0, 3.0, 3.0 * length])) for length in (2e3, 2e4, 1e5)]
    assert_same_frames(batch_of(*needles), max_neighbors=6)
    for needle, frame in zip(needles, build_graph(batch_of(*needles), max_neighbors=6).frame, strict=True):
        np.testing.assert_allclose(np.linalg.norm(frame, axis=1), np.diag(needle.cell))


def test_a_batch_with_a_crystal_at_fault_is_left_alone():
    batch = batch_of(CUBIC, CUBIC)
    graph = build_graph(batch, max_neighbors=6)
    sound = on_device(batch, graph, first_fault=torch.tensor([2]))
    assert torch.equal(sound, graph.frame)
    assert not on_device(batch, graph, first_fault=torch.tensor([1])).any()


@pytest.mark.parametrize("room", [None, 40])
def test_the_whole_graph(room, monkeypatch):
    dataset = CrystalDataset.open(None)
    batch = dataset.gather(np.arange(0, len(dataset), 250))
    expected = build_graph(batch, max_neighbors=12)
    monkeypatch.setattr(neighbors_cuda, "KERNELS", EmulatedModule())
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    n_edges = expected.num_edges
    found = build_graph(batch, max_neighbors=12, max_edges=room and n_edges + room)
    assert found.num_edges == n_edges + (room or 0)
    assert torch.equal(found.edge_index[:, :n_edges], expected.edge_index)
    assert torch.equal(found.edge_vec[:n_edges], expected.edge_vec)
    assert torch.equal(found.frame, expected.frame)
    assert torch.equal(found.row_ptr, expected.row_ptr)


@pytest.mark.parametrize("compat", [None, "comformer"])
def test_room_for_edges_is_for_graphs_built_on_a_device(compat):
    with pytest.raises(ValueError, match="max_edges is for graphs built on a CUDA device"):
        build_graph(batch_of(CUBIC), compat=compat, max_neighbors=6, max_edges=10)
