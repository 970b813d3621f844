"""Triton kernels of the geometry: some 60 bytes an edge, where launches of their own would cost far more."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..launch import launch

BLOCK_ROWS = 256


@triton.jit
def _load_vector(vectors, row, mask):
    """Components of vectors[row], (R, 3), and its length."""
    x = tl.load(vectors + row * 3, mask=mask, other=1)
    y = tl.load(vectors + row * 3 + 1, mask=mask, other=1)
    z = tl.load(vectors + row * 3 + 2, mask=mask, other=1)
    return x, y, z, tl.sqrt(x * x + y * y + z * z)


@triton.jit(do_not_specialize=["num_rows"])
def _inverse_length_kernel(vec, out, num_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, _, _, length = _load_vector(vec, row, row < num_rows)
    tl.store(out + row, -0.75 / length, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_edges"])
def _invariant_geometry_kernel(
    edge_vec, frame, crystal_index, noise, inverse_length, cosines, num_edges, BLOCK: tl.constexpr
):
    edge = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = edge < num_edges
    x, y, z, length = _load_vector(edge_vec, edge, mask)
    tl.store(inverse_length + edge, -0.75 / length, mask=mask)
    crystal = tl.load(crystal_index + edge, mask=mask, other=0)
    for m in tl.static_range(3):
        fx, fy, fz, frame_length = _load_vector(frame, crystal * 3 + m, mask)
        # No direction has no angle: as torch's `normalize`, 1e-12 stands for a smaller length.
        cosine = (x * fx + y * fy + z * fz) / (tl.maximum(length, 1e-12) * tl.maximum(frame_length, 1e-12))
        cosine = tl.where(cosine > 1, 1, tl.where(cosine < -1, -1, cosine))  # what is no number stays none
        if noise is not None:
            cosine += tl.load(noise + edge * 3 + m, mask=mask, other=0)
        tl.store(cosines + edge * 3 + m, cosine, mask=mask)


def inverse_length(vec: torch.Tensor) -> torch.Tensor:
    """Launch `inverse_length`, (..., 3) → (...)."""
    out = vec.new_empty(vec.shape[:-1])
    grid = (triton.cdiv(out.numel(), BLOCK_ROWS),)
    launch(_inverse_length_kernel, grid, vec.contiguous(), out, out.numel(), BLOCK=BLOCK_ROWS)
    return out


def invariant_geometry(edge_vec, frame, crystal_index, cosine_noise) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `invariant_geometry`: inverse lengths, (E,), and cosines, (E, 3)."""
    num_edges = edge_vec.shape[0]
    inverse_length = edge_vec.new_empty(num_edges)
    cosines = edge_vec.new_empty(num_edges, 3)
    launch(
        _invariant_geometry_kernel,
        (triton.cdiv(num_edges, BLOCK_ROWS),),
        edge_vec.contiguous(),
        frame.contiguous(),
        crystal_index,
        None if cosine_noise is None else cosine_noise.contiguous(),
        inverse_length,
        cosines,
        num_edges,
        BLOCK=BLOCK_ROWS,
    )
    return inverse_length, cosines
