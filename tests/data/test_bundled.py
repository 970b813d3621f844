import collections

import numpy as np
import pytest
import torch

from mgt_fast.data import CrystalDataset
from mgt_fast.graph import neighbor_list


@pytest.fixture(scope="module")
def bundled():
    return CrystalDataset.open()


def test_counts(bundled):
    assert len(bundled) == len(set(bundled.ids)) == 6317
    parts = collections.Counter(bundled.split.tolist())
    assert parts == {"train": 5481, "val": 434, "test": 362, "": 40}
    known = {name: int((~np.isnan(values)).sum()) for name, values in bundled.targets.items()}
    assert known == {
        "formation_energy_per_atom": 3938,
        "e_above_hull": 3938,
        "band_gap": 1056,
        "log10_K_VRH": 1181,
        "log10_G_VRH": 1181,
    }
    assert bundled.target_units["log10_K_VRH"] == "log10(GPa)"
    assert bundled.target_units["formation_energy_per_atom"] == "eV/atom"


def test_silicon(bundled):
    """a = 5.47 Å with PBE, eight atoms; bulk modulus 83 GPa."""
    index = list(bundled.ids).index("mp-149")
    silicon = bundled.gather([index])
    assert silicon.numbers.tolist() == [14] * 8
    assert silicon.cell[0].norm(dim=1).tolist() == pytest.approx([5.47] * 3, abs=0.01)
    assert 10 ** bundled.targets["log10_K_VRH"][index] == pytest.approx(83, abs=1)


def test_values_are_physical(bundled):
    targets = bundled.targets
    assert np.nanmin(targets["formation_energy_per_atom"]) > -5
    assert np.nanmax(targets["formation_energy_per_atom"]) < 3
    assert np.nanmin(targets["e_above_hull"]) >= 0
    assert np.nanmin(targets["band_gap"]) > 0
    crystals = bundled.gather(np.arange(len(bundled)))
    volume_per_atom = torch.linalg.det(crystals.cell).abs() / crystals.num_atoms
    assert volume_per_atom.min() > 3
    assert neighbor_list(crystals, cutoff=0.5).edge_index.shape[1] == 0
