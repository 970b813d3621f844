"""The CUDA neighbour list without a GPU: its kernels' source runs on the host, block by block."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from crystals import Crystal, batch_of, described_anew, prototypes, supercell
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_neighbor_list import CUBIC, FAULTS, all_pairs, with_atoms_far_away, with_frac
from test_neighbor_list import crystals as crystals_of_any_shape

from mgt_fast import CrystalBatch, graph, neighbor_list, neighbors_cuda

_emulated = pytest.importorskip("mgt_fast._emulated", reason="built by editable installs on Linux")

PBC = st.tuples(st.booleans(), st.booleans(), st.booleans())


class EmulatedModule:
    """Stands in for a CudaModule: the same kernels, on the host and its memory."""

    def __init__(self):
        self.launched = []

    def launch(self, kernel, blocks, threads, *args):
        values = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
        self.launched.append(kernel)
        if blocks:
            _emulated.launch(kernel, blocks, threads, *values)


@pytest.fixture(autouse=True, scope="module")
def kernels():
    with pytest.MonkeyPatch.context() as patch:
        module = EmulatedModule()
        patch.setattr(neighbors_cuda, "KERNELS", module)
        yield module


def options(**given):
    defaults = {"cutoff": 0.0, "max_neighbors": 0, "half": False, "shell_tolerance": 1e-4}
    return {**defaults, "shell_margin": False, "threads": 1, **given}


def on_device(batch, max_edges=None, **given):
    return graph._neighbors_on_device(batch, options(**given), max_edges)


def assert_same_lists(batch, **mode):
    found, expected = on_device(batch, **mode), neighbor_list(batch, **mode)
    for name, tensor in vars(expected).items():
        other = getattr(found, name)
        assert other is None if tensor is None else torch.equal(other, tensor), name


def test_the_kernels_run(kernels):
    kernels.launched.clear()
    on_device(batch_of(CUBIC), max_neighbors=6)
    assert kernels.launched == ["prepare_crystals", "find_shells", "count_edges", "fill_edges"]


@pytest.mark.parametrize(
    "mode",
    [
        {"cutoff": 5},
        {"cutoff": np.float32(5), "half": np.bool_(True)},
        {"cutoff": torch.tensor(5.0)},
        {"max_neighbors": np.int32(12), "shell_tolerance": 0, "shell_margin": 1},
        {"max_neighbors": 12, "shell_tolerance": np.float32(1e-4), "max_edges": np.int16(500)},
    ],
    ids=str,
)
def test_numbers_of_any_type(mode, monkeypatch):
    """Kernels are handed what the caller writes, and CuPy does not know which types they take."""
    batch = batch_of(CUBIC, CUBIC)
    expected = neighbor_list(batch, **{name: mode[name] for name in mode if name != "max_edges"})
    n_edges = expected.edge_vec.shape[0]
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    found = neighbor_list(batch, **mode)
    assert n_edges > 0
    assert torch.equal(found.edge_vec[:n_edges], expected.edge_vec)
    assert torch.equal(found.row_ptr, expected.row_ptr)


@pytest.mark.parametrize("k", [1, 12, 25])
def test_equals_the_host_on_prototypes(k):
    crystals = [c for _, c in prototypes(16)][:: 3 if k == 12 else 9]
    assert_same_lists(batch_of(*crystals), max_neighbors=k, shell_margin=True)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("cutoff", [2.0, 5.0])
def test_equals_the_host_within_a_cutoff(cutoff, half):
    rng = np.random.default_rng(0)
    crystals = [described_anew(c, rng) for _, c in prototypes(12)][::7]
    assert_same_lists(batch_of(*crystals), cutoff=cutoff, half=half)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(crystals_of_any_shape(), st.floats(0.5, 7.0), PBC, st.booleans())
def test_equals_the_host_on_any_cell_within_a_cutoff(crystal, cutoff, pbc, half):
    assume(not len(all_pairs(crystal, 0.02, pbc)[0]))
    assert_same_lists(batch_of(crystal, pbc=pbc), cutoff=cutoff, half=half)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(crystals_of_any_shape(), st.integers(1, 30), PBC)
def test_equals_the_host_on_any_cell_to_the_kth_neighbour(crystal, k, pbc):
    assume(not len(all_pairs(crystal, 0.02, pbc)[0]) and (any(pbc) or k < len(crystal.frac)))
    assert_same_lists(batch_of(crystal, pbc=pbc), max_neighbors=k, shell_margin=True)


@pytest.mark.parametrize(
    "pbc", [(True, True, True), (True, True, False), (False, True, False), (False, False, False)]
)
def test_equals_the_host_on_large_cells(pbc):
    rng = np.random.default_rng(0)
    cell = 1.4 * np.array([[9.0, 0, 0], [4.0, 11.0, 0], [-7.0, 3.0, 8.0]])
    grid = np.stack(np.meshgrid(*[np.arange(6)] * 3), -1).reshape(-1, 3)
    crystal = Crystal(np.full(216, 6), (grid + rng.uniform(0, 0.6, (216, 3))) / 6, cell)
    batch = batch_of(crystal, CUBIC, pbc=pbc) if all(pbc) else batch_of(crystal, pbc=pbc)
    assert_same_lists(batch, cutoff=3.5)
    assert_same_lists(batch, max_neighbors=8)


@pytest.mark.parametrize("k", [130, 600])
def test_more_neighbours_than_the_pool_holds(k):
    rng = np.random.default_rng(0)
    shaken = supercell(CUBIC, (2, 1, 1))
    shaken = shaken._replace(frac=shaken.frac + 0.01 * rng.normal(size=shaken.frac.shape))
    assert_same_lists(batch_of(CUBIC, shaken), max_neighbors=k, shell_margin=True)


def test_more_equal_distances_than_the_pool_holds():
    """The bracket around the k-th closes on the one distance it can be."""
    points = np.stack(np.meshgrid(*[np.arange(-9, 10)] * 3), -1).reshape(-1, 3)
    lengths = (points**2).sum(1)
    assert np.count_nonzero(lengths == 89) == 144
    k = int(np.count_nonzero(lengths < 89)) - 1 + 70
    assert_same_lists(batch_of(CUBIC), max_neighbors=k)


def test_large_crystals_are_prepared_by_more_threads(monkeypatch):
    monkeypatch.setattr(neighbors_cuda, "_LARGE_CRYSTAL", 10)
    rng = np.random.default_rng(0)
    large = supercell(CUBIC, (11, 9, 8))
    large = large._replace(frac=large.frac + 0.01 * rng.normal(size=large.frac.shape))
    assert_same_lists(batch_of(large, CUBIC), cutoff=3.2)


def test_an_atom_far_from_the_others_lets_the_search_grow():
    crystal = with_frac([0, 0, 0], [0.05, 0, 0], [0.1, 0, 0], [0.05, 0.05, 0], [0.5, 0.5, 0.5])
    crystal = crystal._replace(cell=40.0 * np.eye(3))
    for pbc in ((True, True, True), (False, False, True), (False, False, False)):
        assert_same_lists(batch_of(crystal, pbc=pbc), max_neighbors=4, shell_margin=True)


def test_wires_long_cells_and_atoms_far_away():
    wire = CUBIC._replace(cell=np.diag([100.0, 4.0, 4.0]))
    assert_same_lists(batch_of(wire, pbc=(True, False, False)), max_neighbors=30)
    long = with_frac([0, 0, 0.1], [0.5, 0.5, 0.1001])._replace(cell=np.diag([3.0, 3.0, 3000.0]))
    assert_same_lists(batch_of(long), cutoff=5.0)
    scattered = with_atoms_far_away(60, [60.0, 150.0, 151.0, 400.0])
    assert_same_lists(batch_of(scattered, pbc=[False] * 3), max_neighbors=7, shell_margin=True)
    slab = with_frac([0, 0, 0], [0, 0, 20.0])._replace(cell=np.diag([3.0, 3.0, 1e5]))
    with pytest.raises(ValueError, match="atom 1: fractional coordinate c is 20"):
        on_device(batch_of(slab, pbc=(True, True, False)), cutoff=5.0)


@pytest.mark.parametrize("mode", [{"cutoff": 3.0}, {"max_neighbors": 4}], ids=["cutoff", "max_neighbors"])
@pytest.mark.parametrize(("crystal", "message"), FAULTS.values(), ids=FAULTS)
def test_crystals_at_fault_are_named_as_by_the_host(crystal, message, mode):
    batch = replace(batch_of(CUBIC, CUBIC, crystal, crystal), ids=("a", "b", "third", "d"))
    with pytest.raises(ValueError, match=f"structure 'third': .*{message}"):
        on_device(batch, **mode)
    fixed = on_device(batch, max_edges=1000, **mode)
    assert fixed.status.device_values[1] == 2
    assert not fixed.row_ptr.any()
    with pytest.raises(ValueError, match=f"structure 'third': .*{message}"):
        fixed.status.check()


def test_after_a_fault_only_edges_that_were_counted_count():
    """Whatever the memory held before, and although a fault that shows late leaves atoms uncounted."""
    rng = np.random.default_rng(0)
    large = supercell(CUBIC, (4, 4, 4))
    frac = large.frac[::-1] + 0.01 * rng.normal(size=large.frac.shape)
    frac[30] = frac[31]
    torch.use_deterministic_algorithms(True)  # new arrays are filled with the largest integer
    try:
        found = on_device(batch_of(CUBIC, large._replace(frac=frac), CUBIC), max_edges=10, cutoff=4.0)
    finally:
        torch.use_deterministic_algorithms(False)
    n_edges, fault = found.status.device_values.tolist()
    assert fault == 1
    assert 0 < n_edges < 66 * 12
    assert not found.row_ptr.any()


def test_searches_too_large_are_refused():
    with pytest.raises(ValueError, match=r"too many images: within 1e\+03 Å .* lower the cutoff"):
        on_device(batch_of(CUBIC), cutoff=1000.0)
    with pytest.raises(ValueError, match=r"too many images: .* lower max_neighbors"):
        on_device(batch_of(CUBIC), max_neighbors=10**9)
    pair = with_frac([0, 0, 0], [0.4, 0, 0])
    with pytest.raises(ValueError, match="only 1 neighbours, fewer than max_neighbors = 2"):
        on_device(batch_of(pair, pbc=[False] * 3), max_neighbors=2)


@pytest.mark.parametrize(
    "batch_ptr", [[0, 1, 1, 3], [0, 2, 1, 3], [1, 2, 2, 3], [0, 1, 2, 4], [0, 1, 2, 2], [0, -1, 2, 3]]
)
def test_a_broken_batch_ptr_is_refused(batch_ptr):
    batch = replace(batch_of(CUBIC, CUBIC, CUBIC), batch_ptr=torch.tensor(batch_ptr))
    with pytest.raises(ValueError, match=r"batch_ptr|frac_coords"):
        on_device(batch, cutoff=3.0)


def test_a_fault_the_host_does_not_find_is_no_silence(monkeypatch):
    status = graph.ListStatus(torch.tensor([0, 0]), 10, batch_of(CUBIC), options(cutoff=3.0))
    with pytest.raises(RuntimeError, match="structure '0' was refused on cpu and accepted"):
        status.check()


def test_fixed_capacity():
    batch = batch_of(*[c for _, c in prototypes(4)][:5])
    expected = neighbor_list(batch, max_neighbors=12)
    n_edges = expected.edge_vec.shape[0]
    for room in (0, 37):
        found = on_device(batch, n_edges + room, max_neighbors=12)
        assert found.status.check() == n_edges
        for name in ("edge_index", "edge_vec", "cell_shift"):
            along = -1 if name == "edge_index" else 0
            full, there = getattr(found, name), getattr(expected, name)
            assert full.shape[along] == n_edges + room
            assert torch.equal(full.narrow(along, 0, n_edges), there)
            assert not full.narrow(along, n_edges, room).any()
        assert torch.equal(found.row_ptr, expected.row_ptr)


def test_overflow_leaves_an_empty_list_and_names_the_capacity_to_try_again_with():
    batch = batch_of(CUBIC, CUBIC)
    found = on_device(batch, 11, cutoff=3.0)
    assert not found.row_ptr.any()
    assert not found.edge_vec.any()
    assert found.status.device_values.tolist() == [12, 2]
    with pytest.raises(ValueError, match="max_edges = 11, but there are 12 edges"):
        found.status.check()
    again = on_device(batch, int(found.status.device_values[0]), cutoff=3.0)
    assert again.status.check() == 12
    assert torch.equal(again.edge_vec, neighbor_list(batch, cutoff=3.0).edge_vec)


def test_no_crystals_have_no_neighbours():
    empty = CrystalBatch.from_arrays([], np.zeros((0, 3)), np.zeros((0, 3, 3)), [])
    for max_edges in (None, 5):
        found = on_device(empty, max_edges, cutoff=5.0)
        assert found.edge_index.shape == (2, max_edges or 0)
        assert found.row_ptr.tolist() == [0]


def test_a_capacity_is_for_the_device():
    with pytest.raises(ValueError, match="max_edges needs crystals on a CUDA device; they are on cpu"):
        neighbor_list(batch_of(CUBIC), cutoff=3.0, max_edges=10)
    with pytest.raises(ValueError, match="max_edges = 0"):
        neighbor_list(batch_of(CUBIC), cutoff=3.0, max_edges=0)


def test_tensors_that_disagree_are_refused():
    batch = batch_of(CUBIC)
    with pytest.raises(ValueError, match=r"crystals\.cell has shape \(2, 3, 3\), expected \(1, 3, 3\)"):
        on_device(replace(batch, cell=batch.cell.repeat(2, 1, 1)), cutoff=3.0)
    with pytest.raises(ValueError, match=r"crystals\.pbc is on meta and crystals\.numbers on cpu"):
        on_device(replace(batch, pbc=batch.pbc.to("meta")), cutoff=3.0)


def test_the_emulation_tells_threads_that_went_apart():
    with pytest.raises(RuntimeError, match=r"thread 1 of block 0 waits at __syncwarp .*not all lanes"):
        _emulated.launch("odd_lanes_alone", 1, 32)
    with pytest.raises(RuntimeError, match=r"thread 0 of block 0 waits at __syncwarp .*not all lanes"):
        _emulated.launch("lanes_at_two_sites", 1, 32)
    with pytest.raises(RuntimeError, match=r"thread 32 of block 0 waits at __syncthreads .*not all threads"):
        _emulated.launch("warps_at_two_barriers", 1, 64)
    with pytest.raises(RuntimeError, match="whole warps"):
        _emulated.launch("odd_lanes_alone", 1, 16)


def test_the_emulation_takes_what_a_gpu_understands():
    root = torch.zeros(1, dtype=torch.float64)
    _emulated.launch("square_root", 1, 32, 9.0, root.data_ptr())
    assert root.item() == 3
    for square in (9, np.float64(9), True):
        with pytest.raises(TypeError, match="a kernel's parameter is a float, not"):
            _emulated.launch("square_root", 1, 32, square, root.data_ptr())
    for address in (0.0, np.int64(0), False):
        with pytest.raises(TypeError, match="a kernel's parameter is an int, not"):
            _emulated.launch("square_root", 1, 32, 9.0, address)
    with pytest.raises(TypeError, match="takes 2 arguments, not 1"):
        _emulated.launch("square_root", 1, 32, 9.0)
