from dataclasses import replace

import numpy as np
import pytest
import torch
from small_datasets import random_crystals, write

from mgt_fast.data import CrystalDataset, resident
from mgt_fast.data.resident import ResidentCrystals
from mgt_fast.graph import build_graph

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
DEVICES = pytest.mark.parametrize("device", ["cpu", CUDA])


@pytest.fixture
def dataset(tmp_path):
    return CrystalDataset.open(write(tmp_path / "d", random_crystals(40, np.random.default_rng(0))))


def assert_same_bits(found, expected):
    for name in ("numbers", "frac_coords", "cell", "batch_ptr", "pbc"):
        tensor, other = getattr(found, name).cpu(), getattr(expected, name)
        assert tensor.dtype == other.dtype, name
        assert tensor.numpy().tobytes() == other.numpy().tobytes(), name
        assert tensor.shape == other.shape, name
        assert tensor.is_contiguous(), name
    assert found.ids == expected.ids


@DEVICES
@pytest.mark.parametrize("piece", [1, 7, 2**16])
def test_batches_are_those_of_the_dataset(dataset, monkeypatch, device, piece):
    monkeypatch.setattr(resident, "PIECE", piece)
    held = ResidentCrystals(dataset, device)
    assert len(held) == 40
    for indices in ([39, 0, 7, 7, 6], [3], [], np.random.default_rng(1).integers(0, 40, 500)):
        batch = held.gather(indices)
        assert batch.numbers.device.type == device
        assert_same_bits(batch, dataset.gather(indices))


@DEVICES
def test_some_crystals_can_be_held_alone(dataset, device):
    held = ResidentCrystals(dataset, device, np.array([31, 4, 5, 31, 0]))
    assert len(held) == 4
    assert_same_bits(held.gather([4, 31, 0, 4]), dataset.gather([4, 31, 0, 4]))
    for missing in (1, 39):
        with pytest.raises(IndexError, match=f"crystal {missing} is not among the 4 held"):
            held.gather([4, missing])
    assert len(ResidentCrystals(dataset, device, []).gather([])) == 0
    ascending = np.array([0, 4, 31])
    held = ResidentCrystals(dataset, device, ascending)
    ascending[:] = 7
    assert_same_bits(held.gather([31, 0]), dataset.gather([31, 0]))
    for wrong in (-1, 40):
        with pytest.raises(IndexError, match=f"crystal {wrong} of a dataset of 40"):
            ResidentCrystals(dataset, device, [0, wrong])


@DEVICES
def test_what_is_not_there_is_refused(dataset, device):
    held = ResidentCrystals(dataset, device)
    for wrong in (-1, 40):
        with pytest.raises(IndexError, match=f"crystal {wrong} of a dataset of 40"):
            held.gather([0, wrong])
    with pytest.raises(TypeError, match="float64"):
        held.gather([0.5])


@DEVICES
@pytest.mark.parametrize("indices", [None, [5, 1, 5, 30]])
def test_memory_is_known_beforehand(dataset, device, indices):
    held = ResidentCrystals(dataset, device, indices)
    tensors = [value for value in vars(held).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5
    total = sum(tensor.nbytes for tensor in tensors)
    assert ResidentCrystals.nbytes(dataset, indices) == held.nbytes_held == total
    assert ResidentCrystals.fits(dataset, device, indices)
    assert not ResidentCrystals.fits(dataset, device, indices, share=0.0)


def test_graphs_are_the_same():
    dataset = CrystalDataset.open()
    indices = np.random.default_rng(0).permutation(len(dataset))[:300]
    held = ResidentCrystals(dataset, "cpu", indices)
    found, expected = (build_graph(source.gather(indices)) for source in (held, dataset))
    assert torch.equal(found.edge_index, expected.edge_index)
    assert found.edge_vec.numpy().tobytes() == expected.edge_vec.numpy().tobytes()
    assert found.frame.numpy().tobytes() == expected.frame.numpy().tobytes()


def test_narrower_positions_would_change_graphs():
    """Why they are not offered."""
    dataset = CrystalDataset.open()
    crystals = dataset.gather(np.arange(len(dataset)))
    rounded = replace(crystals, frac_coords=(crystals.frac_coords * 2**32).round() / 2**32)
    frames, others = build_graph(crystals).frame, build_graph(rounded).frame
    changed = ((frames - others).abs().amax((1, 2)) > 1e-3).sum()
    assert 0 < changed < 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_host_does_not_wait(dataset):
    held = ResidentCrystals(dataset, "cuda")
    held.gather([1, 2])
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = held.gather([3, 4, 5])
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert_same_bits(batch, dataset.gather([3, 4, 5]))
