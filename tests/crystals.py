"""Crystals to test on, and other descriptions of the same crystal."""

from typing import NamedTuple

import numpy as np
from pymatgen.analysis.prototypes import AFLOW_PROTOTYPE_LIBRARY

from mgt_fast import CrystalBatch


class Crystal(NamedTuple):
    """One crystal: atomic numbers (N,), fractional coordinates (N, 3), lattice vectors as rows (3, 3), Å."""

    numbers: np.ndarray
    frac: np.ndarray
    cell: np.ndarray

    @property
    def positions(self):
        return self.frac @ self.cell


def batch_of(*crystals, pbc=None):
    return CrystalBatch.from_arrays(
        np.concatenate([c.numbers for c in crystals]),
        np.concatenate([c.frac for c in crystals]),
        np.stack([c.cell for c in crystals]),
        [len(c.numbers) for c in crystals],
        None if pbc is None else [pbc] * len(crystals),
    )


def prototype_structures():
    return [entry["snl"].structure for entry in AFLOW_PROTOTYPE_LIBRARY]


def prototypes(max_atoms=1000):
    """The AFLOW prototypes with at most `max_atoms` atoms, as (index, Crystal)."""
    for index, structure in enumerate(prototype_structures()):
        if len(structure) <= max_atoms:
            yield (
                index,
                Crystal(np.array(structure.atomic_numbers), structure.frac_coords, structure.lattice.matrix),
            )


def random_rotation(rng):
    matrix = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    return matrix * np.sign(np.linalg.det(matrix))


def random_unimodular(rng, steps=6):
    matrix = np.eye(3, dtype=int)
    for _ in range(steps):
        a, b = rng.choice(3, 2, replace=False)
        matrix[a] += rng.choice([-1, 1]) * matrix[b]
    return matrix if rng.random() < 0.5 else matrix[[1, 0, 2]]


def supercell(crystal, repeats):
    repeats = np.asarray(repeats)
    shifts = np.stack(np.meshgrid(*map(np.arange, repeats), indexing="ij"), -1).reshape(-1, 3)
    frac = (crystal.frac[:, None] + shifts) / repeats
    return Crystal(
        np.repeat(crystal.numbers, len(shifts)), frac.reshape(-1, 3), repeats[:, None] * crystal.cell
    )


def described_anew(crystal, rng):
    """Describe the same crystal with another cell, origin, order of atoms and orientation."""
    change = random_unimodular(rng)
    frac = crystal.frac @ np.linalg.inv(change) + rng.uniform(-1, 1, 3)
    frac += rng.integers(-2, 3, frac.shape)  # atoms need not lie inside the cell
    order = rng.permutation(len(frac))
    return Crystal(crystal.numbers[order], frac[order], change @ crystal.cell @ random_rotation(rng))
