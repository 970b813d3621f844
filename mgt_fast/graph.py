"""The crystal graph and the periodic neighbour list behind it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch


@dataclass(frozen=True)
class CrystalGraph:
    """The periodic graphs of B crystals: N atoms, E directed edges, each beside its reverse.

    Edges are sorted by (row 0, row 1, cell_shift), so the edges that start at one atom are contiguous.

    Attributes:
        numbers: atomic numbers, (N,) int64.
        edge_index: (2, E) int64; row 0 is the atom an edge vector starts from, row 1 the one it points to.
        edge_vec: r_e = x[row 1] + cell_shift · cell − x[row 0], (E, 3), Å.
        cell_shift: lattice translation of the atom pointed to, (E, 3) int32.
        frame: the lattice frame L_1..3 as rows, (B, 3, 3), Å.
        batch_ptr: first atom of each crystal and N at the end, (B + 1,) int64.
        row_ptr: first edge of each atom (CSR over row 0) and E at the end, (N + 1,) int64.
        ids: one name a crystal.
    """

    numbers: torch.Tensor
    edge_index: torch.Tensor
    edge_vec: torch.Tensor
    cell_shift: torch.Tensor
    frame: torch.Tensor
    batch_ptr: torch.Tensor
    row_ptr: torch.Tensor
    ids: tuple[str, ...]

    @property
    def num_atoms(self) -> int:
        """Number of atoms N."""
        return self.numbers.shape[0]

    @property
    def num_edges(self) -> int:
        """Number of directed edges E."""
        return self.edge_index.shape[1]

    @property
    def num_crystals(self) -> int:
        """Number of crystals B."""
        return self.batch_ptr.shape[0] - 1

    @property
    def batch(self) -> torch.Tensor:
        """Crystal of each atom, (N,) int64."""
        crystals = torch.arange(self.num_crystals, device=self.batch_ptr.device)
        return crystals.repeat_interleave(self.batch_ptr.diff(), output_size=self.num_atoms)

    def to(self, *, device=None, dtype: torch.dtype | None = None) -> CrystalGraph:
        """Return the graph on `device`, with its lengths in `dtype`."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                moved[field.name] = value.to(device, dtype if value.is_floating_point() else None)
        return replace(self, **moved)
