"""The neighbour list on a GPU: equal to the host's, without waiting for the device, and captured.

Memory and races are checked by `PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m
pytest tests/cuda -k odd`, and the same with `--tool racecheck`.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mgt_fast import CrystalBatch, cuda_module, neighbor_list, neighbors_cuda
from mgt_fast.cuda_module import CudaModule
from mgt_fast.data import CrystalDataset

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# Numbers of several types: CuPy hands each over as wide as it is.
MODES = [
    {"cutoff": 5},
    {"cutoff": np.float32(5), "half": True},
    {"max_neighbors": np.int32(12)},
    {"max_neighbors": 25, "shell_margin": True},
    {"max_neighbors": 300},
]


@pytest.fixture(scope="module")
def real():
    """Bundled crystals."""
    dataset = CrystalDataset.open(None)
    return dataset.gather(np.random.default_rng(0).permutation(len(dataset))[:512])


def odd_crystals(count=200, seed=0):
    """Skewed, stretched and partly periodic cells, with atoms outside them."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 9, count)
    sizes[:4] = [300, 900, 70, 65]
    cells = []
    for n in sizes:
        lengths = 2.5 * n ** (1 / 3) * rng.uniform(0.9, 2, 3)
        cells.append(np.diag(lengths) + np.tril(rng.uniform(-9, 9, (3, 3)), -1))
    pbc = rng.random((count, 3)) < 0.7
    pbc[:, 2] |= sizes < 9
    # A jittered grid keeps atoms apart.
    frac = []
    for n in sizes:
        side = int(np.ceil(n ** (1 / 3)))
        grid = np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3)[:n]
        frac.append((grid + rng.uniform(0, 0.6, (n, 3))) / side + rng.integers(-1, 2, (n, 3)))
    return CrystalBatch.from_arrays(
        np.full(sizes.sum(), 6), np.concatenate(frac), np.stack(cells), sizes, pbc=pbc
    )


def assert_equal(found, expected, n_edges=None):
    for name, tensor in vars(expected).items():
        if isinstance(tensor, torch.Tensor):
            other = getattr(found, name).cpu()
            if n_edges is not None and name in ("edge_index", "edge_vec", "cell_shift"):
                other = other.narrow(1 if name == "edge_index" else 0, 0, n_edges)
            assert torch.equal(other, tensor), name


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_equals_the_host_on_real_crystals(real, mode):
    batch = real if mode.get("max_neighbors", 0) < 100 else CrystalDataset.open(None).gather(np.arange(40))
    found = neighbor_list(batch.to("cuda"), **mode)
    assert found.edge_vec.is_cuda
    assert_equal(found, neighbor_list(batch, **mode))


@pytest.mark.parametrize("mode", MODES[:4], ids=str)
def test_equals_the_host_on_odd_cells(mode):
    batch = odd_crystals()
    assert_equal(neighbor_list(batch.to("cuda"), **mode), neighbor_list(batch, **mode))


@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_equals_the_host_on_a_large_crystal(mode):
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3), -1).reshape(-1, 3)
    frac = (grid + rng.uniform(0, 0.5, grid.shape)) / 24
    batch = CrystalBatch.from_arrays(np.full(len(grid), 6), frac, 24 * 2.6 * np.eye(3)[None], [len(grid)])
    assert_equal(neighbor_list(batch.to("cuda"), **mode), neighbor_list(batch, **mode))


def test_nothing_waits_for_the_device(real):
    batch = real.to("cuda")
    mode = {"max_neighbors": 25}
    expected = neighbor_list(real, **mode)
    capacity = expected.edge_vec.shape[0] + 1000
    neighbor_list(batch, max_edges=capacity, **mode)  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = neighbor_list(batch, max_edges=capacity, **mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    n_edges = found.status.check()
    assert n_edges == capacity - 1000
    assert not found.edge_vec[n_edges:].any()
    assert_equal(found, expected, n_edges)


def test_a_graph_of_launches_replays_on_other_crystals(real):
    mode = {"max_neighbors": 12}
    crystals = real.to("cuda")
    capacity = 2 * neighbor_list(real, **mode).edge_vec.shape[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        neighbor_list(crystals, max_edges=capacity, **mode)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = neighbor_list(crystals, max_edges=capacity, **mode)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        moved = replace(real, frac_coords=real.frac_coords + 0.02 * torch.tensor(rng.normal(size=(1, 3))))
        moved.frac_coords.add_(0.01 * torch.tensor(rng.normal(size=moved.frac_coords.shape)))
        crystals.frac_coords.copy_(moved.frac_coords)
        captured.replay()
        n_edges = found.status.check()
        assert_equal(found, neighbor_list(moved, **mode), n_edges)


def test_overflow_names_the_capacity_to_try_again_with(real):
    batch, mode = real.to("cuda"), {"cutoff": 4.0}
    expected = neighbor_list(real, **mode)
    found = neighbor_list(batch, max_edges=10, **mode)
    with pytest.raises(ValueError, match=f"max_edges = 10, but there are {expected.edge_vec.shape[0]} edges"):
        found.status.check()
    assert not found.row_ptr.any()
    again = neighbor_list(batch, max_edges=int(found.status.device_values[0]), **mode)
    again.status.check()
    assert_equal(again, expected)


def test_faults_are_told_as_by_the_host(real):
    for change in (
        lambda c: c.frac_coords[777].fill_(float("nan")),
        lambda c: c.cell[99].mul_(1e-3),
        lambda c: c.frac_coords[int(c.batch_ptr[70]) : int(c.batch_ptr[71])].fill_(0.25),
    ):
        broken = replace(real, frac_coords=real.frac_coords.clone(), cell=real.cell.clone())
        change(broken)
        with pytest.raises(ValueError, match="structure") as on_host:
            neighbor_list(broken, max_neighbors=12)
        with pytest.raises(ValueError, match="structure") as on_device:
            neighbor_list(broken.to("cuda"), max_neighbors=12)
        assert str(on_device.value) == str(on_host.value)


def test_other_streams(real):
    batch = real.to("cuda")
    expected = neighbor_list(real, cutoff=4.0)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = neighbor_list(batch, cutoff=4.0)
        torch.cuda.current_stream().synchronize()
    assert_equal(found, expected)


def test_nvrtc_compiles_the_same_source(real, monkeypatch, tmp_path):
    """Without a fatbin; the list must not change."""
    (tmp_path / "csrc").symlink_to(Path(cuda_module._BUILT) / "csrc")
    monkeypatch.setattr(cuda_module, "_BUILT", tmp_path)
    monkeypatch.setattr(neighbors_cuda, "KERNELS", CudaModule("neighbor_list"))
    found = neighbor_list(real.to("cuda"), max_neighbors=25)
    assert_equal(found, neighbor_list(real, max_neighbors=25))
