"""Crystals as flat arrays: what every part of mgt-fast takes in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

MAX_ATOMIC_NUMBER = 118


@dataclass(frozen=True)
class CrystalBatch:
    """A ragged batch of B crystals with N atoms in all.

    Attributes:
        numbers: atomic numbers, (N,) int64.
        frac_coords: fractional coordinates, (N, 3) float64; atoms may lie outside the cell.
        cell: lattice vectors as rows, (B, 3, 3) float64, Å.
        batch_ptr: first atom of each crystal and N at the end, (B + 1,) int64.
        pbc: periodic along each lattice vector, (B, 3) bool.
        ids: one name a crystal, used in error messages and in output tables.
    """

    numbers: torch.Tensor
    frac_coords: torch.Tensor
    cell: torch.Tensor
    batch_ptr: torch.Tensor
    pbc: torch.Tensor
    ids: Sequence[str]

    @classmethod
    def from_arrays(cls, numbers, frac_coords, cell, num_atoms, pbc=None, ids: Sequence[str] | None = None):
        """Build a batch from flat arrays (anything NumPy or torch can read).

        Args:
            numbers: atomic numbers of all crystals one after the other, (N,).
            frac_coords: fractional coordinates, (N, 3).
            cell: lattice vectors as rows, (B, 3, 3), Å.
            num_atoms: atoms of each crystal, (B,), all at least 1.
            pbc: periodicity, (B, 3) bool; periodic in all directions when absent.
            ids: one name a crystal; "0", "1", ... when absent.

        Raises:
            ValueError: if shapes disagree, a crystal has no atom, or an atomic number is unknown; the
                message names the crystal, the atom and the value.
        """
        numbers = _tensor("numbers", numbers, torch.int64)
        frac_coords = _tensor("frac_coords", frac_coords, torch.float64)
        cell = _tensor("cell", cell, torch.float64)
        num_atoms = _tensor("num_atoms", num_atoms, torch.int64)
        n_crystals = num_atoms.numel()
        pbc = (
            torch.ones(n_crystals, 3, dtype=torch.bool, device=numbers.device)
            if pbc is None
            else _tensor("pbc", pbc, torch.bool)
        )
        ids = tuple(str(i) for i in (range(n_crystals) if ids is None else ids))
        n_atoms = numbers.numel()
        for name, value, shape in (
            ("numbers", numbers, (n_atoms,)),
            ("num_atoms", num_atoms, (n_crystals,)),
            ("frac_coords", frac_coords, (n_atoms, 3)),
            ("cell", cell, (n_crystals, 3, 3)),
            ("pbc", pbc, (n_crystals, 3)),
        ):
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
        if len(ids) != n_crystals:
            raise ValueError(f"{len(ids)} ids for {n_crystals} crystals")
        empty = torch.nonzero(num_atoms <= 0).flatten()
        if empty.numel():
            b = int(empty[0])
            raise ValueError(f"crystal {ids[b]!r} has {int(num_atoms[b])} atoms; remove it or give it atoms")
        if int(num_atoms.sum()) != n_atoms:
            raise ValueError(f"num_atoms adds up to {int(num_atoms.sum())}, but there are {n_atoms} atoms")
        batch_ptr = torch.zeros(n_crystals + 1, dtype=torch.int64, device=num_atoms.device)
        batch_ptr[1:] = num_atoms.cumsum(0)
        unknown = torch.nonzero((numbers < 1) | (numbers > MAX_ATOMIC_NUMBER)).flatten()
        if unknown.numel():
            atom = int(unknown[0])
            b = int(torch.searchsorted(batch_ptr, atom, right=True)) - 1
            raise ValueError(
                f"crystal {ids[b]!r}, atom {atom - int(batch_ptr[b])}: atomic number {int(numbers[atom])} "
                f"is not between 1 and {MAX_ATOMIC_NUMBER}"
            )
        return cls(numbers, frac_coords.contiguous(), cell.contiguous(), batch_ptr, pbc, ids)

    @classmethod
    def from_structures(cls, structures: Sequence, ids: Sequence[str] | None = None):
        """Build a batch from pymatgen Structures and ASE Atoms (they may be mixed).

        Raises:
            TypeError: for any other kind of object, among them a single structure outside a list.
            ValueError: for an empty list, a structure without a cell, with partial occupancy or with sites
                that hold no element.
        """
        if _is_pymatgen(structures) or _is_ase(structures):
            raise TypeError(f"structures is a single {type(structures).__name__}; pass a list, [structure]")
        if not len(structures):
            raise ValueError("no structures were given")
        ids = [str(i) for i in range(len(structures))] if ids is None else [str(i) for i in ids]
        parts = [_arrays_of(structure, name) for structure, name in zip(structures, ids, strict=True)]
        numbers, frac_coords, cells, pbc = zip(*parts, strict=True)
        return cls.from_arrays(
            np.concatenate(numbers),
            np.concatenate(frac_coords),
            np.stack(cells),
            [len(n) for n in numbers],
            np.stack(pbc),
            ids,
        )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_atoms(self) -> torch.Tensor:
        """Atoms of each crystal, (B,) int64."""
        return self.batch_ptr.diff()

    def to(self, device) -> CrystalBatch:
        """Return the batch with its tensors on `device`; copies from pinned memory do not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> CrystalBatch:
        """Return the batch in pinned memory, for copies to a CUDA device."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> CrystalBatch:
        tensors = ("numbers", "frac_coords", "cell", "batch_ptr", "pbc")
        return replace(self, **{name: function(getattr(self, name)) for name in tensors})


def _tensor(name: str, value, dtype: torch.dtype) -> torch.Tensor:
    value = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
    converted = value.to(dtype)
    if dtype == torch.int64 and value.is_floating_point() and (converted != value).any():
        raise ValueError(f"{name} holds {value[converted != value][0]}, which is not a whole number")
    return converted


def _is_pymatgen(structure) -> bool:
    return hasattr(structure, "lattice") and hasattr(structure, "frac_coords")


def _is_ase(structure) -> bool:
    return hasattr(structure, "get_scaled_positions")


def _arrays_of(structure, name: str):
    """Return (numbers, frac_coords, cell, pbc) of one pymatgen Structure or ASE Atoms as NumPy arrays."""
    if _is_pymatgen(structure):
        from pymatgen.core import DummySpecies

        if not structure.is_ordered:
            site = next(s for s in structure if not s.is_ordered)
            raise ValueError(
                f"structure {name!r}: site {site.species_string!r} has partial occupancy; "
                "order it first (for example with pymatgen's OrderDisorderedStructureTransformation)"
            )
        for atom, site in enumerate(structure):
            if isinstance(site.specie, DummySpecies):
                raise ValueError(
                    f"structure {name!r}, atom {atom}: {site.species_string!r} is not an element; "
                    "replace or remove it"
                )
        numbers = [site.specie.Z for site in structure]
        return np.array(numbers), structure.frac_coords, structure.lattice.matrix, np.array(structure.pbc)
    if _is_ase(structure):
        cell = np.array(structure.cell)
        if abs(np.linalg.det(cell)) < 1e-6:
            raise ValueError(
                f"structure {name!r}: the cell {cell.tolist()} has no volume; "
                "give it one (for example atoms.center(vacuum=10))"
            )
        return structure.numbers, structure.get_scaled_positions(wrap=False), cell, np.array(structure.pbc)
    raise TypeError(
        f"structure {name!r} is a {type(structure).__name__}; expected a pymatgen Structure or ASE Atoms"
    )
