"""Neighbour lists of crystals on a CUDA device: allocation and launches, with nothing brought to the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cuda_module import CudaModule
from .structures import CrystalBatch

KERNELS = CudaModule("neighbor_list")

_THREADS = 128
_WARPS = _THREADS // 32
_MOST_THREADS = 512  # kMostThreads of csrc/neighbor_list.cu
_LARGE_CRYSTAL = 1000  # atoms a crystal from which its block takes more threads
_CRYSTAL_BYTES = 384  # kSearchCellBytes of csrc/neighbor_device.hpp


@dataclass(frozen=True)
class Search:
    """Rows that have been counted on the device, ready to be filled in.

    Attributes:
        n_crystals: B.
        n_atoms: N.
        half: whether one of each edge and its reverse is kept.
        rows: (N + 2,) int64: where each atom's row starts, the number of edges, and the first crystal that
            must be refused, or B.
        shell_margin: (N,) float64 or None; see `NeighborList`.
        workspace: the arrays that the kernels hand to one another.
    """

    n_crystals: int
    n_atoms: int
    half: bool
    rows: torch.Tensor
    shell_margin: torch.Tensor | None
    workspace: tuple[torch.Tensor, ...]

    @property
    def status(self) -> torch.Tensor:
        """Number of edges counted and first crystal that must be refused (B if there is none), (2,) int64."""
        return self.rows[-2:]


def count_edges(
    crystals: CrystalBatch,
    *,
    cutoff: float,
    max_neighbors: int,
    half: bool,
    shell_tolerance: float,
    shell_margin: bool,
) -> Search:
    """Find how many edges every atom has; one of `cutoff` and `max_neighbors` is zero.

    Source: csrc/neighbor_list.cu.
    """
    n_atoms, n_crystals = crystals.numbers.shape[0], len(crystals)
    if n_atoms >= 2**31 - n_crystals:
        raise ValueError(f"{n_atoms} atoms in one batch; split it below 2^31 atoms")

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=crystals.numbers.device)

    rows = torch.zeros(n_atoms + 2, dtype=torch.int64, device=crystals.numbers.device)
    first_fault = rows[-1:].fill_(n_crystals)
    row_length = empty(n_atoms, dtype=torch.int64).zero_()  # after a fault not every atom is counted
    cells = empty(n_crystals, _CRYSTAL_BYTES, dtype=torch.uint8)
    bin_start = empty(n_atoms + n_crystals, dtype=torch.int32)
    slot_atom, slot_crystal = empty(2, n_atoms, dtype=torch.int32)
    slot_position = empty(n_atoms, 3, dtype=torch.float64)
    slot_wrap = empty(n_atoms, 3, dtype=torch.int32)
    slot_limit = empty(n_atoms, dtype=torch.float64)
    margin = empty(n_atoms, dtype=torch.float64) if shell_margin else None
    slots = (cells, bin_start, slot_atom, slot_crystal, slot_position)
    warps = -(-n_atoms // _WARPS)

    KERNELS.launch(
        "prepare_crystals",
        n_crystals,
        _THREADS if n_atoms < _LARGE_CRYSTAL * n_crystals else _MOST_THREADS,
        n_crystals,
        n_atoms,
        crystals.batch_ptr.contiguous(),
        crystals.frac_coords.contiguous(),
        crystals.cell.contiguous(),
        crystals.pbc.contiguous(),
        cutoff,
        max_neighbors,
        *slots,
        slot_wrap,
        slot_limit,
        first_fault,
    )
    if max_neighbors:
        KERNELS.launch(
            "find_shells",
            warps,
            _THREADS,
            n_crystals,
            n_atoms,
            max_neighbors,
            shell_tolerance,
            *slots,
            slot_limit,
            0 if margin is None else margin,
            first_fault,
        )
    KERNELS.launch(
        "count_edges",
        warps,
        _THREADS,
        n_crystals,
        n_atoms,
        int(half),
        *slots,
        slot_limit,
        row_length,
        first_fault,
    )
    torch.cumsum(row_length, 0, out=rows[1:-1])
    return Search(n_crystals, n_atoms, half, rows, margin, (*slots, slot_wrap, slot_limit))


def fill_edges(search: Search, capacity: int, *, padded: bool) -> dict[str, torch.Tensor]:
    """Write the edges into arrays of `capacity`; without room for all of them the list is empty.

    Args:
        search: what `count_edges` found.
        capacity: room for so many edges.
        padded: the capacity may be larger than the number of edges; entries after the last edge are zero.

    Returns:
        edge_index (2, capacity), edge_vec (capacity, 3), cell_shift (capacity, 3), row_ptr (N + 1,), and
        shell_margin (N,) if it was asked for.
    """
    new = torch.zeros if padded else torch.empty
    device = search.rows.device
    edge_index = new(2, capacity, dtype=torch.int64, device=device)
    edge_vec = new(capacity, 3, dtype=torch.float64, device=device)
    cell_shift = new(capacity, 3, dtype=torch.int32, device=device)
    row_ptr = torch.zeros(search.n_atoms + 1, dtype=torch.int64, device=device)
    KERNELS.launch(
        "fill_edges",
        -(-search.n_atoms // _WARPS),
        _THREADS,
        search.n_crystals,
        search.n_atoms,
        int(search.half),
        *search.workspace,
        search.rows,
        capacity,
        row_ptr,
        edge_index,
        edge_vec,
        cell_shift,
        search.rows[-1:],
    )
    found = {"edge_index": edge_index, "edge_vec": edge_vec, "cell_shift": cell_shift, "row_ptr": row_ptr}
    if search.shell_margin is not None:
        found["shell_margin"] = search.shell_margin
    return found
