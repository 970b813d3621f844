"""Triton kernels of the tensor products: maps between an edge's hidden channels and its atoms' features.

Every edge e joins an atom of a group (`order`, `ptr`) to an atom at its other end (`other`). Features of an
atom are S scalars, V vectors of degree 1 and V of degree 2, side by side, [S + 3V + 5V]. With the harmonics
Y of the edge, made in registers, and with a last hidden channel that is 1 (the bias), the maps are

    invariants   s_e = (x, x_1 · Y_1, x_2 · Y_2) of the other atom                     [U = S + 2V]
    outer        A_g = Σ_e (h_e, 1) ⊗ s_e over the edges of g                          [K + 1, U]
    apply        c_e = (h_e, 1) M_g, and its gradient M_g s_e to h_e                   [U], [K]
    spread       X_g = Σ_e (c_e, c_1e ⊗ Y_1, c_2e ⊗ Y_2) over the edges of g           [S + 3V + 5V]
    turn         gradient of c_e · s_e to the edge's vector                            [3]

A contraction to scalars is `outer` over receivers and one dense product A_g W; its gradient is a dense
product M_g = W dout_g, `apply` over receivers and `spread` over senders. An expansion to vectors is the same
turned round: M_g = W x_g, `apply` over senders, `spread` over receivers; its gradient is `outer` over
senders, a dense product, and `apply`. Both add into one gradient of h. There is no E × weight_rows tensor; A
and M, [K + 1, U] an atom, exist for a few thousand atoms at a time.

One program is one atom (`outer`: and some of the channels, which leaves registers for more programs). Its
edges are read 32 at a time, since atoms have about 28, as the columns of tiles whose rows are channels or
features: a Hopper matrix instruction wants 64 rows and is content with 8 columns.

Work an edge, at b bytes a number and d edges an atom; in bfloat16 at d = 28 all of it is bound by memory:
    outer    2 K U FLOP;  K b + (K + 1) U b / d bytes, and features from the L2 cache
    apply    2 K U FLOP, 4 K U with the gradient;  K b (2 K b with the gradient) + (K + 1) U b / d + U b bytes
    spread   2 S + 20 V FLOP;  U b + (S + 8 V) b / d bytes
    dense    2 (K + 1) U n / d FLOP;  (K + 1) U b / d bytes, for n columns
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import launch
from ..precision import accumulator_dtype, dot_precision

SQRT_3 = tl.constexpr(3**0.5)
SQRT_15 = tl.constexpr(15**0.5)
RSQRT_3 = tl.constexpr(3**-0.5)

BLOCK_E = 32
SCRATCH_BYTES = 128 * 2**20
"""Bound on A and M: above about 4,000 atoms (bfloat16, C = 256) the work goes in several rounds."""


@triton.jit
def _direction(edge_vec, edge, mask, SUM: tl.constexpr):
    """Unit vector of each edge, and one over its length."""
    x = tl.load(edge_vec + 3 * edge, mask=mask, other=0).to(SUM)
    y = tl.load(edge_vec + 3 * edge + 1, mask=mask, other=0).to(SUM)
    z = tl.load(edge_vec + 3 * edge + 2, mask=mask, other=0).to(SUM)
    inverse = 1 / tl.maximum(tl.sqrt(x * x + y * y + z * z), 1e-12)
    return x * inverse, y * inverse, z * inverse, inverse


@triton.jit
def _harmonics(x, y, z, m):
    """Component m of Y_1 (zero from m = 3 on) and of Y_2."""
    first = tl.where(m == 0, x, tl.where(m == 1, y, tl.where(m == 2, z, x * 0)))
    second = tl.where(m == 3, y * z, (z * z - x * x) * 0.5)
    second = tl.where(m == 2, (y * y - (x * x + z * z) * 0.5) * RSQRT_3, second)
    second = tl.where(m == 0, x * z, tl.where(m == 1, x * y, second))
    return first * SQRT_3, second * SQRT_15


@triton.jit
def _component(
    features, atom, row, mask, m: tl.constexpr, S: tl.constexpr, V: tl.constexpr, SUM: tl.constexpr
):
    """Component m of the vectors of each edge's atom: rows [0, V) of degree 1, [V, 2V) of degree 2."""
    column = S + tl.where(row < V, 3 * row, 5 * row - 2 * V) + m
    mask = mask & (row < 2 * V) & ((row >= V) | (m < 3))
    return tl.load(features + atom * (S + 8 * V) + column, mask=mask, other=0).to(SUM)


@triton.jit
def _invariants(features, atom, row, mask, x, y, z, S: tl.constexpr, V: tl.constexpr, SUM: tl.constexpr):
    """Products of the vectors of each edge's atom with the harmonics, as rows × edges or edges × rows."""
    total = _component(features, atom, row, mask, 0, S, V, SUM)
    first, second = _harmonics(x, y, z, 0)
    total *= tl.where(row < V, first, second)
    for m in tl.static_range(1, 5):
        first, second = _harmonics(x, y, z, m)
        total += _component(features, atom, row, mask, m, S, V, SUM) * tl.where(row < V, first, second)
    return total


@triton.jit
def _outer_kernel(
    hidden, features, edge_vec, order, ptr, other, out,
    K: tl.constexpr, S: tl.constexpr, V: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One atom's A, BLOCK_K channels of it; the last row is the sum of the invariants."""
    group = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    s, v = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    scalars, vectors = tl.zeros((BLOCK_K, BLOCK_S), SUM), tl.zeros((BLOCK_K, BLOCK_V), SUM)
    scalar_sum, vector_sum = tl.zeros((BLOCK_S,), SUM), tl.zeros((BLOCK_V,), SUM)
    first, last = tl.load(ptr + group), tl.load(ptr + group + 1)
    for start in range(first, last, BLOCK_E):
        place = start + tl.arange(0, BLOCK_E)
        mask = place < last
        edge = tl.load(order + place, mask=mask, other=0)
        atom = tl.load(other + edge, mask=mask, other=0)
        h = tl.load(hidden + edge[None, :] * K + k[:, None], mask=mask[None, :], other=0)  # [K, E]
        if S > 0:
            inside = mask[:, None] & (s < S)[None, :]
            part = tl.load(features + atom[:, None] * (S + 8 * V) + s[None, :], mask=inside, other=0)
            scalars = tl.dot(h, part, scalars, input_precision=PRECISION, out_dtype=SUM)
            scalar_sum += tl.sum(part.to(SUM), 0)
        if V > 0:
            x, y, z, _ = _direction(edge_vec, edge, mask, SUM)
            part = _invariants(
                features, atom[:, None], v[None, :], mask[:, None],
                x[:, None], y[:, None], z[:, None], S, V, SUM,
            )  # fmt: skip
            vectors = tl.dot(h, part.to(h.dtype), vectors, input_precision=PRECISION, out_dtype=SUM)
            vector_sum += tl.sum(part, 0)
    U: tl.constexpr = S + 2 * V
    out += group * ((K + 1) * U)
    bias = tl.program_id(1) == 0
    if S > 0:
        tl.store(out + k[:, None] * U + s[None, :], scalars, mask=(s < S)[None, :])
        tl.store(out + K * U + s, scalar_sum, mask=(s < S) & bias)
    if V > 0:
        tl.store(out + k[:, None] * U + S + v[None, :], vectors, mask=(v < 2 * V)[None, :])
        tl.store(out + K * U + S + v, vector_sum, mask=(v < 2 * V) & bias)


@triton.jit
def _apply_kernel(
    matrix, hidden, features, edge_vec, order, ptr, other, out, grad_hidden,
    K: tl.constexpr, S: tl.constexpr, V: tl.constexpr, ADD: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Coefficients of one atom's edges, and the gradient of their hidden channels; either may be left out."""
    U: tl.constexpr = S + 2 * V
    group = tl.program_id(0).to(tl.int64)
    matrix += group * ((K + 1) * U)
    s, v = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    first, last = tl.load(ptr + group), tl.load(ptr + group + 1)
    for start in range(first, last, BLOCK_E):
        place = start + tl.arange(0, BLOCK_E)
        mask = place < last
        edge = tl.load(order + place, mask=mask, other=0)
        columns = mask[None, :]
        if grad_hidden is not None:
            atom = tl.load(other + edge, mask=mask, other=0)[None, :]
            if S > 0:
                inside = columns & (s < S)[:, None]
                scalar_part = tl.load(features + atom * (S + 8 * V) + s[:, None], mask=inside, other=0)
            if V > 0:
                x, y, z, _ = _direction(edge_vec, edge, mask, SUM)
                vector_part = _invariants(
                    features, atom, v[:, None], columns, x[None, :], y[None, :], z[None, :], S, V, SUM
                ).to(hidden.dtype.element_ty)
        if out is not None:
            if S > 0:
                bias = tl.load(matrix + K * U + s, mask=s < S, other=0).to(SUM)
                scalars = tl.zeros((BLOCK_S, BLOCK_E), SUM) + bias[:, None]
            if V > 0:
                bias = tl.load(matrix + K * U + S + v, mask=v < 2 * V, other=0).to(SUM)
                vectors = tl.zeros((BLOCK_V, BLOCK_E), SUM) + bias[:, None]
        for first_k in range(0, K, BLOCK_K):
            k = first_k + tl.arange(0, BLOCK_K)
            cells = edge[None, :] * K + k[:, None]
            if out is not None:
                h = tl.load(hidden + cells, mask=columns, other=0)  # [K, E]
            if grad_hidden is not None:
                grad = tl.zeros((BLOCK_K, BLOCK_E), SUM)
                if ADD:
                    grad += tl.load(grad_hidden + cells, mask=columns, other=0).to(SUM)
            if S > 0:
                block = tl.load(matrix + k[:, None] * U + s[None, :], mask=(s < S)[None, :], other=0)
                if out is not None:
                    scalars = tl.dot(tl.trans(block), h, scalars, input_precision=PRECISION, out_dtype=SUM)
                if grad_hidden is not None:
                    grad = tl.dot(block, scalar_part, grad, input_precision=PRECISION, out_dtype=SUM)
            if V > 0:
                block = tl.load(matrix + k[:, None] * U + S + v[None, :], mask=(v < 2 * V)[None, :], other=0)
                if out is not None:
                    vectors = tl.dot(tl.trans(block), h, vectors, input_precision=PRECISION, out_dtype=SUM)
                if grad_hidden is not None:
                    grad = tl.dot(block, vector_part, grad, input_precision=PRECISION, out_dtype=SUM)
            if grad_hidden is not None:
                tl.store(grad_hidden + cells, grad, mask=columns)
        if out is not None:
            if S > 0:
                tl.store(out + edge[None, :] * U + s[:, None], scalars, mask=columns & (s < S)[:, None])
            if V > 0:
                inside = columns & (v < 2 * V)[:, None]
                tl.store(out + edge[None, :] * U + S + v[:, None], vectors, mask=inside)


@triton.jit
def _spread_kernel(
    coefficients, edge_vec, order, ptr, out,
    S: tl.constexpr, V: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """One atom's sum of coefficients, those of degree l times the harmonics."""
    U: tl.constexpr = S + 2 * V
    group = tl.program_id(0).to(tl.int64)
    s, v, m = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V), tl.arange(0, 8)
    scalars, vectors = tl.zeros((BLOCK_S,), SUM), tl.zeros((BLOCK_V, 8), SUM)
    first, last = tl.load(ptr + group), tl.load(ptr + group + 1)
    for start in range(first, last, BLOCK_E):
        place = start + tl.arange(0, BLOCK_E)
        mask = place < last
        edge = tl.load(order + place, mask=mask, other=0)
        if S > 0:
            inside = mask[:, None] & (s < S)[None, :]
            part = tl.load(coefficients + edge[:, None] * U + s[None, :], mask=inside, other=0)
            scalars += tl.sum(part.to(SUM), 0)
        if V > 0:
            x, y, z, _ = _direction(edge_vec, edge, mask, SUM)
            degree_1, degree_2 = _harmonics(
                x[:, None, None], y[:, None, None], z[:, None, None], m[None, None, :]
            )
            inside = mask[:, None] & (v < 2 * V)[None, :]
            part = tl.load(coefficients + edge[:, None] * U + S + v[None, :], mask=inside, other=0).to(SUM)
            vectors += tl.sum(part[:, :, None] * tl.where(v[None, :, None] < V, degree_1, degree_2), 0)
    out += group * (S + 8 * V)
    if S > 0:
        tl.store(out + s, scalars, mask=s < S)
    if V > 0:
        row, m = v[:, None], m[None, :]
        inside = (row < 2 * V) & (m < tl.where(row < V, 3, 5))
        tl.store(out + S + tl.where(row < V, 3 * row, 5 * row - 2 * V) + m, vectors, mask=inside)


@triton.jit
def _slopes(coefficient, features, atom, row, mask, m: tl.constexpr, S: tl.constexpr, V: tl.constexpr):
    """Gradients with respect to component m of Y_1 and of Y_2, (edges,)."""
    product = coefficient * _component(features, atom, row, mask, m, S, V, coefficient.dtype)
    return tl.sum(tl.where(row < V, product, 0), 1), tl.sum(tl.where(row < V, 0, product), 1)


@triton.jit(do_not_specialize=["num_edges"])
def _turn_kernel(
    coefficients, features, edge_vec, other, out, num_edges,
    S: tl.constexpr, V: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Gradient of Σ_e c_e · s_e to the edge vectors, through the harmonics of their directions."""
    edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = edge < num_edges
    atom = tl.load(other + edge, mask=mask, other=0)[:, None]
    row, inside = tl.arange(0, BLOCK_V)[None, :], mask[:, None]
    c = tl.load(
        coefficients + edge[:, None] * (S + 2 * V) + S + row, mask=inside & (row < 2 * V), other=0
    ).to(SUM)
    x1, xz = _slopes(c, features, atom, row, inside, 0, S, V)
    y1, xy = _slopes(c, features, atom, row, inside, 1, S, V)
    z1, yy = _slopes(c, features, atom, row, inside, 2, S, V)
    _, yz = _slopes(c, features, atom, row, inside, 3, S, V)
    _, zz = _slopes(c, features, atom, row, inside, 4, S, V)
    yy *= RSQRT_3
    x, y, z, inverse = _direction(edge_vec, edge, mask, SUM)
    # With respect to the unit vector: √3 Y_1's, and √15 times that of the quadratic forms Y_2.
    gx = SQRT_3 * x1 + SQRT_15 * (z * xz + y * xy - x * (yy + zz))
    gy = SQRT_3 * y1 + SQRT_15 * (x * xy + z * yz + 2 * y * yy)
    gz = SQRT_3 * z1 + SQRT_15 * (x * xz + y * yz + z * (zz - yy))
    along = gx * x + gy * y + gz * z  # the length does not matter
    tl.store(out + 3 * edge, (gx - along * x) * inverse, mask=mask)
    tl.store(out + 3 * edge + 1, (gy - along * y) * inverse, mask=mask)
    tl.store(out + 3 * edge + 2, (gz - along * z) * inverse, mask=mask)


class Edges(NamedTuple):
    """Edges of n atoms: `order[ptr[i] : ptr[i + 1]]` are atom i's; `other` is each edge's second atom."""

    order: torch.Tensor
    ptr: torch.Tensor
    other: torch.Tensor

    def of(self, atoms: slice) -> Edges:
        """Edges of some of the atoms."""
        return self._replace(ptr=self.ptr[atoms.start : atoms.stop + 1])


def _rounds(num_atoms: int, row: int, like: torch.Tensor) -> Iterator[slice]:
    """Atoms a round, so that a matrix of `row` numbers for each stays below SCRATCH_BYTES."""
    size = max(SCRATCH_BYTES // (row * like.element_size()) // 16, 1) * 16
    for start in range(0, num_atoms, size):
        yield slice(start, min(start + size, num_atoms))


def _constants(dtype: torch.dtype, S: int, V: int) -> dict:
    """Compile-time arguments that every kernel takes."""
    return {
        "S": S,
        "V": V,
        "BLOCK_E": BLOCK_E,
        "BLOCK_V": triton.next_power_of_2(max(2 * V, 16)),
        "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
    }


def _tile(hidden: torch.Tensor, S: int, V: int, block_k: int) -> dict:
    """Compile-time arguments of a kernel with matrix products; fewer channels a tile beside many features."""
    constants = _constants(hidden.dtype, S, V)
    block_s = triton.next_power_of_2(max(S, 16))
    fitting = 2**14 // triton.next_power_of_2(block_s + constants["BLOCK_V"])
    return constants | {
        "K": hidden.shape[1],
        "BLOCK_K": min(hidden.shape[1], block_k, fitting),
        "BLOCK_S": block_s,
        "PRECISION": dot_precision(),
    }


def _outer(hidden, features, edge_vec, edges: Edges, S: int, V: int) -> torch.Tensor:
    """Launch `outer`, (n, (K + 1)·U)."""
    num_atoms, channels = edges.ptr.shape[0] - 1, hidden.shape[1]
    out = hidden.new_empty(num_atoms, (channels + 1) * (S + 2 * V))
    block_k, warps = (128, 8) if hidden.dtype == torch.bfloat16 else (64, 4)
    tile = _tile(hidden, S, V, block_k)
    launch(
        _outer_kernel, (num_atoms, channels // tile["BLOCK_K"]), hidden, features, edge_vec, *edges, out,
        num_warps=warps, num_stages=1, **tile,
    )  # fmt: skip
    return out


def _apply(
    matrix, hidden, features, edge_vec, edges: Edges, S: int, V: int, out, grad_hidden=None, add=False
):
    """Launch `apply` into `out` (E, U) and `grad_hidden` (E, K), one of which may be None."""
    constants = _tile(hidden, S, V, 64)
    targets = [(out, grad_hidden)]
    if hidden.dtype == torch.float32 and constants["PRECISION"] == "tf32x3":
        # Factors split in three leave registers for one product at a time.
        targets = [pair for pair in ((out, None), (None, grad_hidden)) if pair != (None, None)]
    for pair in targets:
        launch(
            _apply_kernel, (edges.ptr.shape[0] - 1,), matrix, hidden, features, edge_vec, *edges, *pair,
            num_warps=4, num_stages=3, ADD=add, **constants,
        )  # fmt: skip


def _spread(coefficients, edge_vec, edges: Edges, S: int, V: int) -> torch.Tensor:
    """Launch `spread`, (n, S + 8V)."""
    num_atoms = edges.ptr.shape[0] - 1
    out = coefficients.new_empty(num_atoms, S + 8 * V)
    constants = _constants(coefficients.dtype, S, V) | {"BLOCK_E": BLOCK_E // 2}  # for fewer registers
    launch(
        _spread_kernel, (num_atoms,), coefficients, edge_vec, edges.order, edges.ptr, out,
        BLOCK_S=triton.next_power_of_2(max(S, 16)), **constants,
    )  # fmt: skip
    return out


def _turn(coefficients, features, edge_vec, other, S: int, V: int) -> torch.Tensor:
    """Launch `turn`, (E, 3)."""
    out, num_edges = torch.empty_like(edge_vec), edge_vec.shape[0]
    launch(
        _turn_kernel, (triton.cdiv(num_edges, BLOCK_E),),
        coefficients, features, edge_vec, other, out, num_edges, **_constants(coefficients.dtype, S, V),
    )  # fmt: skip
    return out


def forward(
    features: torch.Tensor,
    hidden: torch.Tensor,
    edge_vec: torch.Tensor,
    contraction: torch.Tensor,
    expansion: torch.Tensor,
    num_scalars: int,
    receivers: Edges,
    senders: Edges,
) -> torch.Tensor:
    """Contract all features to scalars and expand the scalars to vectors, summed over each atom's edges.

    Args:
        features: of the sending atoms, (N, S + 8V).
        hidden: (E, K).
        edge_vec: (E, 3), float32 or better.
        contraction: ((K + 1)·(S + 2V), S').
        expansion: (S, (K + 1)·2V').
        num_scalars: S.
        receivers: edges of each receiving atom, beside their senders.
        senders: edges of each sending atom, beside their receivers.

    Returns:
        (N, S' + 8V').
    """
    S, V = num_scalars, (features.shape[1] - num_scalars) // 8
    num_atoms, (rows, width), wide = features.shape[0], contraction.shape, expansion.shape[1]
    vectors = wide // (2 * hidden.shape[1] + 2)
    out = features.new_empty(num_atoms, width + 8 * vectors)
    for atoms in _rounds(num_atoms, rows, hidden):
        out[atoms, :width] = _outer(hidden, features, edge_vec, receivers.of(atoms), S, V) @ contraction
    if vectors:
        coefficients = hidden.new_empty(hidden.shape[0], 2 * vectors)
        for atoms in _rounds(num_atoms, wide, hidden):
            matrix = features[atoms, :S] @ expansion
            _apply(matrix, hidden, None, edge_vec, senders.of(atoms), 0, vectors, coefficients)
        out[:, width:] = _spread(coefficients, edge_vec, receivers, 0, vectors)
    return out


def backward(
    grad: torch.Tensor,
    features: torch.Tensor,
    hidden: torch.Tensor,
    edge_vec: torch.Tensor,
    contraction: torch.Tensor,
    expansion: torch.Tensor,
    num_scalars: int,
    receivers: Edges,
    senders: Edges,
    wants_edge_vec: bool,
) -> list[torch.Tensor]:
    """Gradients of `forward`: of features, hidden, contraction, expansion, and of edge_vec if wanted."""
    S, V = num_scalars, (features.shape[1] - num_scalars) // 8
    num_atoms, (rows, width), wide = features.shape[0], contraction.shape, expansion.shape[1]
    vectors = wide // (2 * hidden.shape[1] + 2)
    to_scalars, to_vectors = grad[:, :width], grad[:, width:].contiguous()
    grad_hidden = torch.empty_like(hidden)
    grad_contraction, grad_expansion = (
        torch.zeros_like(weight, dtype=accumulator_dtype(weight.dtype)) for weight in (contraction, expansion)
    )

    coefficients = hidden.new_empty(hidden.shape[0], S + 2 * V)
    for atoms in _rounds(num_atoms, rows, hidden):
        part, edges = to_scalars[atoms], receivers.of(atoms)
        grad_contraction += _outer(hidden, features, edge_vec, edges, S, V).t() @ part
        matrix = part @ contraction.t()
        _apply(matrix, hidden, features, edge_vec, edges, S, V, coefficients, grad_hidden)
    grad_features = _spread(coefficients, edge_vec, senders, S, V)
    grad_vec = torch.zeros_like(edge_vec) if wants_edge_vec else None
    if wants_edge_vec and V:
        grad_vec += _turn(coefficients, features, edge_vec, receivers.other, S, V)

    if vectors:
        coefficients = hidden.new_empty(hidden.shape[0], 2 * vectors) if wants_edge_vec else None
        for atoms in _rounds(num_atoms, wide, hidden):
            part, edges = features[atoms, :S], senders.of(atoms)
            outer = _outer(hidden, to_vectors, edge_vec, edges, 0, vectors)
            grad_features[atoms, :S] += outer @ expansion.t()
            grad_expansion += part.t() @ outer
            matrix = part @ expansion
            _apply(
                matrix, hidden, to_vectors, edge_vec, edges, 0, vectors, coefficients, grad_hidden, add=True
            )
        if wants_edge_vec:
            grad_vec += _turn(coefficients, to_vectors, edge_vec, senders.other, 0, vectors)
    weights = grad_contraction.to(contraction.dtype), grad_expansion.to(expansion.dtype)
    return [grad_features, grad_hidden, *weights, *([grad_vec] if wants_edge_vec else [])]
