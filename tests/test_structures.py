import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from pymatgen.core import DummySpecies, Lattice, Structure

from mgt_fast import CrystalBatch

CELL = np.diag([3.0, 4.0, 5.0])


def arrays(**changes):
    good = {
        "numbers": [1, 2, 3],
        "frac_coords": [[0, 0, 0], [0.3, 0.3, 0.3], [0.6, 0.6, 0.6]],
        "cell": [CELL, CELL],
        "num_atoms": [1, 2],
    }
    return CrystalBatch.from_arrays(**good | changes)


def test_from_arrays():
    batch = arrays(ids=["a", "b"], pbc=[[True, True, False], [True] * 3])
    assert len(batch) == 2
    assert batch.batch_ptr.tolist() == [0, 1, 3]
    assert batch.num_atoms.tolist() == [1, 2]
    assert batch.pbc.tolist() == [[True, True, False], [True] * 3]
    assert batch.frac_coords.dtype == batch.cell.dtype == torch.float64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numbers": [1, 2, 119]}, "crystal '1', atom 1: atomic number 119 is not between 1 and 118"),
        ({"numbers": [0, 2, 3]}, "crystal '0', atom 0: atomic number 0"),
        ({"numbers": [1, 2.5, 3]}, "numbers holds 2.5, which is not a whole number"),
        ({"num_atoms": [1, math.nan]}, "num_atoms holds nan, which is not a whole number"),
        ({"num_atoms": [0, 3]}, "crystal '0' has 0 atoms"),
        ({"num_atoms": [1, 3]}, "num_atoms adds up to 4, but there are 3 atoms"),
        ({"cell": [CELL]}, r"cell has shape \(1, 3, 3\), expected \(2, 3, 3\)"),
        ({"frac_coords": np.zeros((3, 2))}, r"frac_coords has shape \(3, 2\)"),
        ({"ids": ["only one"]}, "1 ids for 2 crystals"),
    ],
)
def test_bad_arrays_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        arrays(**changes)


def test_structures_and_atoms_give_the_same_batch():
    atoms = bulk("NaCl", "rocksalt", a=5.64)
    structure = Structure(
        Lattice(atoms.cell.array),
        atoms.get_chemical_symbols(),
        atoms.positions,
        coords_are_cartesian=True,
    )
    batch = CrystalBatch.from_structures([structure, atoms], ids=["p", "a"])
    assert batch.ids == ("p", "a")
    assert batch.numbers.tolist() == [11, 17, 11, 17]
    cartesian = batch.frac_coords @ batch.cell[0]
    torch.testing.assert_close(cartesian[:2], cartesian[2:])
    torch.testing.assert_close(batch.cell[0], batch.cell[1])
    assert batch.pbc.all()


def test_refused_structures():
    partial = Structure(Lattice.cubic(3), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    with pytest.raises(ValueError, match=r"structure 'alloy': site .* has partial occupancy"):
        CrystalBatch.from_structures([partial], ids=["alloy"])
    with pytest.raises(ValueError, match=r"structure '0': the cell .* has no volume"):
        CrystalBatch.from_structures([molecule("H2O")])
    with pytest.raises(TypeError, match="structure '0' is a str"):
        CrystalBatch.from_structures(["NaCl"])
    vacancy = Structure(Lattice.cubic(3), ["Fe", DummySpecies("X")], [[0, 0, 0], [0.5, 0.5, 0.5]])
    with pytest.raises(ValueError, match=r"structure 'gap', atom 1: 'X.*' is not an element"):
        CrystalBatch.from_structures([vacancy], ids=["gap"])
    with pytest.raises(ValueError, match="no structures"):
        CrystalBatch.from_structures([])


@pytest.mark.parametrize(
    "single", [bulk("Si"), Structure(Lattice.cubic(3), ["Po"], [[0, 0, 0]])], ids=["Atoms", "Structure"]
)
def test_a_single_structure_must_be_in_a_list(single):
    with pytest.raises(TypeError, match=f"a single {type(single).__name__}; pass a list"):
        CrystalBatch.from_structures(single)
    assert len(CrystalBatch.from_structures([single])) == 1


def test_atoms_outside_the_cell_stay_where_they_are():
    batch = CrystalBatch.from_structures([Atoms("He", [[7.0, 0, 0]], cell=CELL, pbc=True)])
    torch.testing.assert_close(batch.frac_coords[0, 0], torch.tensor(7 / 3, dtype=torch.float64))
