"""Graphs on a GPU: edges and lattice frames equal the host's bit for bit, without waiting for the device."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_neighbors_gpu import assert_equal, odd_crystals

from mgt_fast import CrystalBatch, build_graph, cuda_module, frames_cuda
from mgt_fast.cuda_module import CudaModule
from mgt_fast.data import CrystalDataset
from mgt_fast.graph import network_input

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def real():
    """Bundled crystals."""
    dataset = CrystalDataset.open(None)
    return dataset.gather(np.random.default_rng(1).permutation(len(dataset))[:512])


def described_anew(batch, rng):
    """Rotate each crystal, double its cell along one axis, and move and reorder its atoms."""
    numbers, frac, cells, sizes = [], [], [], []
    for b in range(len(batch)):
        atoms = slice(int(batch.batch_ptr[b]), int(batch.batch_ptr[b + 1]))
        axis = np.eye(3)[rng.integers(3)]
        doubled = np.concatenate([batch.frac_coords[atoms] + shift * axis for shift in (0, 1)]) / (1 + axis)
        order = rng.permutation(len(doubled))
        numbers.append(np.tile(batch.numbers[atoms], 2)[order])
        frac.append(doubled[order] + rng.uniform(-1, 1, 3))
        rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        rotation *= np.sign(np.linalg.det(rotation))
        cells.append((1 + axis)[:, None] * batch.cell[b].numpy() @ rotation)
        sizes.append(len(order))
    return CrystalBatch.from_arrays(np.concatenate(numbers), np.concatenate(frac), np.stack(cells), sizes)


def assert_same_graph(batch, max_neighbors):
    found = build_graph(batch.to("cuda"), max_neighbors)
    assert found.frame.is_cuda
    assert_equal(found, build_graph(batch, max_neighbors))


@pytest.mark.parametrize("max_neighbors", [12, 25])
def test_real_crystals(real, max_neighbors):
    assert_same_graph(real, max_neighbors)


def test_a_network_gets_graphs_that_its_device_built(real):
    found = network_input(real, torch.device("cuda"), max_neighbors=12, compat=None)
    assert_equal(found, network_input(real, torch.device("cpu"), max_neighbors=12, compat=None))


def test_real_crystals_described_anew(real):
    assert_same_graph(described_anew(real, np.random.default_rng(0)), 25)


def test_odd_cells():
    assert_same_graph(odd_crystals(), 12)


def test_large_crystals():
    """Every atom could start a translation: in the perfect crystal each does, in the shaken one none."""
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(20)] * 3), -1).reshape(-1, 3) / 20
    shaken = grid + 0.01 * rng.uniform(size=grid.shape)
    batch = CrystalBatch.from_arrays(
        np.full(2 * len(grid), 84),
        np.concatenate([grid, shaken]),
        np.stack([20 * 3.0 * np.eye(3)] * 2),
        [len(grid)] * 2,
    )
    assert_same_graph(batch, 25)


def test_nothing_waits_for_the_device(real):
    expected = build_graph(real, 25)
    batch, capacity = real.to("cuda"), expected.num_edges + 1000
    build_graph(batch, 25, max_edges=capacity)  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = build_graph(batch, 25, max_edges=capacity)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(found, expected, found.status.check())


def test_a_graph_of_launches_replays_on_other_crystals(real):
    crystals = real.to("cuda")
    capacity = 2 * build_graph(real, 12).num_edges
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        build_graph(crystals, 12, max_edges=capacity)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = build_graph(crystals, 12, max_edges=capacity)
    for seed in range(3):
        noise = 0.01 * np.random.default_rng(seed).normal(size=real.frac_coords.shape)
        moved = CrystalBatch(**{**vars(real), "frac_coords": real.frac_coords + torch.tensor(noise)})
        crystals.frac_coords.copy_(moved.frac_coords)
        captured.replay()
        assert_equal(found, build_graph(moved, 12), found.status.check())


def test_a_batch_with_a_crystal_at_fault_has_no_frames(real):
    broken = CrystalBatch(**{**vars(real), "cell": real.cell.clone()})
    broken.cell[99] *= 1e-3
    found = build_graph(broken.to("cuda"), 12, max_edges=100_000)
    assert not found.frame.any()
    with pytest.raises(ValueError, match="the cell has a volume of"):
        found.status.check()


def test_nvrtc_compiles_the_same_source(real, monkeypatch, tmp_path):
    """Without a fatbin; the frames must not change."""
    (tmp_path / "csrc").symlink_to(Path(cuda_module._BUILT) / "csrc")
    monkeypatch.setattr(cuda_module, "_BUILT", tmp_path)
    monkeypatch.setattr(frames_cuda, "KERNELS", CudaModule("lattice_frame"))
    assert_same_graph(real, 25)
