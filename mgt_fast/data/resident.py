"""Crystals that live in the memory of a device, so that a batch of them needs no copy from the host.

Positions and cells are held in double precision, exactly as they are stored, so that their graphs are the
same bit for bit: 25 bytes an atom and 83 a crystal, 333 bytes for ten atoms; 10^8 such crystals take 33 GB.
Narrower positions would save a third of it, but not without harm: rounded to 2^-32 of a cell edge, they give
a dozen of the 6,317 bundled crystals another lattice frame.
"""

from __future__ import annotations

import os

import numpy as np
import torch

from ..structures import CrystalBatch
from .ids import ChosenIds
from .store import CrystalDataset, whole_numbers

PIECE = 2**16  # crystals that are copied to the device at a time


class ResidentCrystals:
    """Crystals of a dataset on a device.

    Args:
        dataset: where they are read from; it stays open for their names.
        device: where they are to live.
        indices: positions in the dataset of the crystals wanted; all when absent.
    """

    def __init__(
        self, dataset: CrystalDataset, device: torch.device | str, indices: np.ndarray | None = None
    ):
        self.dataset = dataset
        self.device = torch.device(device)
        self._members = None if indices is None else _members(dataset, indices)
        self._num_atoms = dataset.num_atoms if self._members is None else dataset.num_atoms[self._members]
        n_crystals = len(self._num_atoms)
        atom_ptr = np.zeros(n_crystals + 1, dtype=np.int64)
        np.cumsum(self._num_atoms, out=atom_ptr[1:])

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        n_atoms = int(atom_ptr[-1])
        self._first_atom = torch.from_numpy(atom_ptr[:-1]).to(self.device)
        self._numbers = empty(torch.uint8, n_atoms)
        self._frac_coords = empty(torch.float64, n_atoms, 3)
        self._cell = empty(torch.float64, n_crystals, 3, 3)
        self._pbc = empty(torch.bool, n_crystals, 3)
        for start in range(0, n_crystals, PIECE):
            stop = min(start + PIECE, n_crystals)
            chosen = np.arange(start, stop) if self._members is None else self._members[start:stop]
            piece = dataset.gather(chosen)
            atoms = slice(atom_ptr[start], atom_ptr[stop])
            self._numbers[atoms] = piece.numbers.to(torch.uint8).to(self.device)
            self._frac_coords[atoms] = piece.frac_coords.to(self.device)
            self._cell[start:stop] = piece.cell.to(self.device)
            self._pbc[start:stop] = piece.pbc.to(self.device)

    def __len__(self) -> int:
        return len(self._num_atoms)

    @staticmethod
    def nbytes(dataset: CrystalDataset, indices: np.ndarray | None = None) -> int:
        """Return the bytes of device memory that the crystals of `indices`, or all, take."""
        num_atoms = dataset.num_atoms
        if indices is not None:
            num_atoms = num_atoms[_members(dataset, indices)]
        per_atom, per_crystal = 1 + 3 * 8, 8 + 9 * 8 + 3
        return per_atom * int(num_atoms.sum()) + per_crystal * len(num_atoms)

    @staticmethod
    def fits(
        dataset: CrystalDataset,
        device: torch.device | str,
        indices: np.ndarray | None = None,
        share: float = 0.5,
    ) -> bool:
        """Say whether the crystals take at most `share` of the memory that is free on `device` now."""
        device = torch.device(device)
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return ResidentCrystals.nbytes(dataset, indices) <= share * free

    @property
    def nbytes_held(self) -> int:
        """Bytes of device memory that the crystals take."""
        tensors = (self._first_atom, self._numbers, self._frac_coords, self._cell, self._pbc)
        return sum(tensor.nbytes for tensor in tensors)

    def gather(self, indices) -> CrystalBatch:
        """Return crystals as `CrystalDataset.gather` does, bit for bit, on the device.

        The host sends which crystals are wanted and knows how many atoms they have; it does not wait.

        Args:
            indices: positions in the dataset, (B,) integers on the host; they may repeat.

        Raises:
            IndexError: for a crystal that is not in the dataset, or not among those held.
            TypeError: if `indices` are not whole numbers.
        """
        indices = whole_numbers(indices)
        rows = self._rows(indices)
        num_atoms = self._num_atoms[rows]
        n_crystals, n_atoms = len(rows), int(num_atoms.sum())
        # One copy for all that the device must be told.
        message = torch.empty(2 * n_crystals + 1, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        message[:n_crystals] = torch.from_numpy(rows)
        message[n_crystals] = 0
        message[n_crystals + 1 :] = torch.from_numpy(np.cumsum(num_atoms, dtype=np.int64))
        message = message.to(self.device, non_blocking=True)
        row, batch_ptr = message[:n_crystals], message[n_crystals:].clone()

        offset = self._first_atom[row] - batch_ptr[:-1]
        atom = offset.repeat_interleave(batch_ptr.diff(), output_size=n_atoms)
        atom += torch.arange(n_atoms, device=self.device)
        return CrystalBatch(
            numbers=self._numbers[atom].to(torch.int64),
            frac_coords=self._frac_coords[atom],
            cell=self._cell[row],
            batch_ptr=batch_ptr,
            pbc=self._pbc[row],
            ids=ChosenIds(self.dataset.ids, indices),
        )

    def _rows(self, indices: np.ndarray) -> np.ndarray:
        outside = (indices < 0) | (indices >= len(self.dataset))
        if outside.any():
            raise IndexError(f"crystal {indices[outside][0]} of a dataset of {len(self.dataset)}")
        if self._members is None:
            return indices
        rows = np.searchsorted(self._members, indices)
        held = np.append(self._members, -1)[rows] == indices
        if not held.all():
            raise IndexError(
                f"crystal {indices[~held][0]} is not among the {len(self)} held on {self.device}"
            )
        return rows


def _members(dataset: CrystalDataset, indices: np.ndarray) -> np.ndarray:
    """Return the crystals of `indices`, each once, in ascending order; a copy.

    Raises:
        IndexError: for a position outside the dataset.
    """
    indices = whole_numbers(indices)
    if len(indices) and not 0 <= indices.min() <= indices.max() < len(dataset):
        outside = indices[(indices < 0) | (indices >= len(dataset))]
        raise IndexError(f"crystal {outside[0]} of a dataset of {len(dataset)}")
    if np.all(indices[1:] > indices[:-1]):
        return indices
    held = np.zeros(len(dataset), bool)  # linear in time, where a sort is not
    held[indices] = True
    return np.flatnonzero(held)
