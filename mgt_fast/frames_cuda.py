"""Lattice frames of crystals on a CUDA device: allocation and launch, with nothing brought to the host."""

from __future__ import annotations

import torch

from .cuda_module import CudaModule
from .structures import CrystalBatch

KERNELS = CudaModule("lattice_frame")

_THREADS = 128  # kFrameThreads of csrc/lattice_frame.cu
_MAX_BASES = 24  # kMaxBases of csrc/lattice_bases.hpp


def lattice_frames(
    crystals: CrystalBatch,
    edge_index: torch.Tensor,
    edge_vec: torch.Tensor,
    row_ptr: torch.Tensor,
    first_fault: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose the frames of crystals by their graph; see `build_graph`.

    Args:
        crystals: B crystals with N atoms.
        edge_index: (2, E) int64.
        edge_vec: (E, 3) float64, Å.
        row_ptr: (N + 1,) int64.
        first_fault: (1,) int64, index of the first crystal that is refused or B; absent where all are known
            to be sound. Frames of a batch with a crystal at fault are zero.

    Returns:
        Rows L1, L2, L3 of each frame, (B, 3, 3) float64, Å.

    Source: csrc/lattice_frame.cu.
    """
    n_atoms, n_crystals = crystals.numbers.shape[0], len(crystals)

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=crystals.numbers.device)

    frames = empty(n_crystals, 3, 3).zero_()
    KERNELS.launch(
        "choose_frames",
        n_crystals,
        _THREADS,
        n_crystals,
        crystals.batch_ptr.contiguous(),
        crystals.frac_coords.contiguous(),
        crystals.cell.contiguous(),
        crystals.pbc.contiguous(),
        crystals.numbers.contiguous(),
        edge_index[0],
        edge_index[1],
        edge_vec,
        row_ptr,
        empty(n_atoms, 3),
        empty(2, n_atoms, dtype=torch.int32),
        empty(edge_vec.shape[0], 4),
        empty(2, n_atoms, _MAX_BASES),
        frames,
        0 if first_fault is None else first_fault,
    )
    return frames
