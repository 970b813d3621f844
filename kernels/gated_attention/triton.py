"""Triton kernels of `gated_attention`: two before the output, two for the gradient.

A program holds a tile of rows (an edge with one of its M keys) and makes the first layer's sum, its SiLU and
the second layer's product. Of all intermediates only the keys outlive the forward pass, in the factors' own
type: BatchNorm's statistics need every key before any gate can be computed. Everything else is made again in
the backward pass.

    pass             makes                                               products (C × C)  numbers moved a row
    keys             k, and the sums for the statistics                  2                  2 C + 3 C / M
    values           v · gate, summed over an edge's keys                2                  2 C + 4 C / M
    backward values  gradients behind v, and of the gate                 3                  9 C + 6 C / M
    backward keys    gradients behind k                                  2                  8 C + 6 C / M

The weights' gradients and that of x are plain products of what the last two leave behind: 6 more a row, with
10 C numbers read and written. The forward kernels keep the hidden layer in registers where factors are narrow
and C is at most 256; otherwise it passes through memory, and the tile that wrote it finds it in cache.
Sums over rows are kept per tile and added in a fixed order, so two runs are bitwise equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from ..launch import INTERPRETED, launch, target_arch
from ..precision import accumulator_dtype, dot_precision


@triton.jit
def _tile_rows(near_index, far_index, num_edges, M: tl.constexpr, BLOCK_R: tl.constexpr):
    """Rows of this program's tile: a whole number of edges, the rest of the tile stays idle."""
    edges: tl.constexpr = BLOCK_R // M
    slot = tl.arange(0, BLOCK_R)
    edge = tl.program_id(0).to(tl.int64) * edges + slot // M
    valid = (slot < edges * M) & (edge < num_edges)
    far_row = tl.load(far_index + edge, mask=valid, other=0) * M + slot % M
    near_row = edge if near_index is None else tl.load(near_index + edge, mask=valid, other=0)
    return edge, edge * M + slot % M, near_row, far_row, valid


@triton.jit
def _product(
    acc, a, row, valid, w, k_stride, n_stride, column,
    C: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the product of rows of a [*, C] with a weight, some columns of it, to acc [BLOCK_R, BLOCK_N]."""
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(a + row[:, None] * C + k[None, :], mask=valid[:, None], other=0.0)
        right = tl.load(w + k[:, None] * k_stride + column[None, :] * n_stride)
        acc = tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def _first_layer(
    x, weight, near, far, row, near_row, far_row, valid, column,
    HALF: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of the first layer before its SiLU, of the key (HALF = 0) or the value network (1)."""
    inside = valid[:, None]
    near_at = near + near_row[:, None] * (3 * C) + ((1 + HALF) * C + column)[None, :]
    far_at = far + far_row[:, None] * (2 * C) + (HALF * C + column)[None, :]
    acc = tl.load(near_at, mask=inside, other=0.0).to(ACC)
    acc += tl.load(far_at, mask=inside, other=0.0).to(ACC)
    return _product(
        acc, x, row, valid, weight + HALF * C * C, 1, C, column, C, BLOCK_K, ACC, PRECISION
    )  # fmt: skip


@triton.jit
def _hidden_to_memory(
    hiddens, sums, stride, x, weight, near, far, row, near_row, far_row, valid,
    HALF: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the hidden layer where the whole tile can read it, and, unless None, the sums before its SiLU."""
    inside = valid[:, None]
    for start in range(0, C, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        pre = _first_layer(
            x, weight, near, far, row, near_row, far_row, valid, column, HALF, C, BLOCK_K, ACC, PRECISION
        )  # fmt: skip
        hidden = (pre * tl.sigmoid(pre)).to(hiddens.dtype.element_ty)
        tl.store(hiddens + row[:, None] * C + column[None, :], hidden, mask=inside)
        if sums is not None:
            at = sums + row[:, None] * stride + (HALF * C + column)[None, :]
            tl.store(at, pre.to(sums.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # other threads of the program read what this one has stored


@triton.jit
def _store(
    out, stride, y, row, valid, column, num_edges,
    M: tl.constexpr, BLOCK_R: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Store y at out[row, column]; with FOLD its sum over each edge's keys at out[edge, column]."""
    if FOLD:
        # A product with ones and zeros adds the M rows of each edge.
        edges: tl.constexpr = BLOCK_R // M
        slot = tl.arange(0, triton.next_power_of_2(edges))
        chosen = slot[:, None] == (tl.arange(0, BLOCK_R) // M)[None, :]
        y = tl.where(valid[:, None], y, 0.0)
        total = tl.dot(chosen.to(y.dtype), y, out_dtype=ACC).to(out.dtype.element_ty)
        edge = tl.program_id(0).to(tl.int64) * edges + slot
        inside = (slot < edges) & (edge < num_edges)
        tl.store(out + edge[:, None] * stride + column[None, :], total, mask=inside[:, None])
    else:
        tl.store(out + row[:, None] * stride + column[None, :], y, mask=valid[:, None])


@triton.jit
def _standardise(
    keys, near, mean, inv_std, row, near_row, valid, column,
    C: tl.constexpr, SCALE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Keys and scaled queries of some channels, and their product standardised, each [BLOCK_R, BLOCK_N]."""
    inside = valid[:, None]
    key = tl.load(keys + row[:, None] * C + column[None, :], mask=inside, other=0.0).to(ACC)
    query = tl.load(near + near_row[:, None] * (3 * C) + column[None, :], mask=inside, other=0.0).to(ACC)
    query *= SCALE
    standard = (key * query - tl.load(mean + column)[None, :]) * tl.load(inv_std + column)[None, :]
    return key, query, standard


@triton.jit(do_not_specialize=["num_edges"])
def keys_kernel(
    x, weight, near, near_index, far, far_index, key_w, key_b, hiddens, keys, means, squares,
    num_counted, num_edges,
    C: tl.constexpr, M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr, STATISTICS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys, and each tile's mean and summed squares of query · key / √C about it, of the edges that count."""
    edge, row, near_row, far_row, valid = _tile_rows(near_index, far_index, num_edges, M, BLOCK_R)
    dtype = keys.dtype.element_ty
    inside = valid[:, None]
    counted = valid if num_counted is None else valid & (edge < tl.load(num_counted))
    count = tl.maximum(tl.sum(counted.to(ACC), 0), 1)
    every = tl.arange(0, C)
    if hiddens is None:  # the hidden layer stays in registers
        pre = _first_layer(
            x, weight, near, far, row, near_row, far_row, valid, every, 0, C, BLOCK_K, ACC, PRECISION
        )  # fmt: skip
        hidden = (pre * tl.sigmoid(pre)).to(dtype)
    else:
        _hidden_to_memory(
            hiddens, None, 0, x, weight, near, far, row, near_row, far_row, valid,
            0, C, BLOCK_K, BLOCK_N, ACC, PRECISION,
        )  # fmt: skip
    for start in range(0, C, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        key = tl.zeros((BLOCK_R, BLOCK_N), ACC)
        if hiddens is None:
            w = tl.load(key_w + every[:, None] + column[None, :] * C)
            key = tl.dot(hidden, w, key, input_precision=PRECISION, out_dtype=ACC)
        else:
            key = _product(key, hiddens, row, valid, key_w, 1, C, column, C, BLOCK_K, ACC, PRECISION)
        key = (key + tl.load(key_b + column)[None, :]).to(dtype)
        tl.store(keys + row[:, None] * C + column[None, :], key, mask=inside)
        if STATISTICS:
            at = near + near_row[:, None] * (3 * C) + column[None, :]
            product = key.to(ACC) * (tl.load(at, mask=inside, other=0.0).to(ACC) * SCALE)
            product = tl.where(counted[:, None], product, 0.0)
            mean = tl.sum(product, 0) / count
            centred = tl.where(counted[:, None], product - mean[None, :], 0.0)
            at = tl.program_id(0).to(tl.int64) * C + column
            tl.store(means + at, mean)
            tl.store(squares + at, tl.sum(centred * centred, 0))


@triton.jit(do_not_specialize=["num_edges"])
def values_kernel(
    x, weight, near, near_index, far, far_index, value_w, value_b, hiddens,
    keys, mean, inv_std, norm_w, norm_b, out, num_edges,
    C: tl.constexpr, M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Values times gates; with FOLD summed over each edge's keys."""
    _edge, row, near_row, far_row, valid = _tile_rows(near_index, far_index, num_edges, M, BLOCK_R)
    dtype = out.dtype.element_ty
    every = tl.arange(0, C)
    if hiddens is None:  # the hidden layer stays in registers
        pre = _first_layer(
            x, weight, near, far, row, near_row, far_row, valid, every, 1, C, BLOCK_K, ACC, PRECISION
        )  # fmt: skip
        hidden = (pre * tl.sigmoid(pre)).to(dtype)
    else:
        _hidden_to_memory(
            hiddens, None, 0, x, weight, near, far, row, near_row, far_row, valid,
            1, C, BLOCK_K, BLOCK_N, ACC, PRECISION,
        )  # fmt: skip
    for start in range(0, C, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        value = tl.zeros((BLOCK_R, BLOCK_N), ACC)
        if hiddens is None:
            w = tl.load(value_w + every[:, None] + column[None, :] * C)
            value = tl.dot(hidden, w, value, input_precision=PRECISION, out_dtype=ACC)
        else:
            value = _product(value, hiddens, row, valid, value_w, 1, C, column, C, BLOCK_K, ACC, PRECISION)
        value += tl.load(value_b + column)[None, :]
        _key, _query, standard = _standardise(
            keys, near, mean, inv_std, row, near_row, valid, column, C, SCALE, ACC
        )  # fmt: skip
        gate = tl.sigmoid(standard * tl.load(norm_w + column)[None, :] + tl.load(norm_b + column)[None, :])
        _store(out, C, (gate * value).to(dtype), row, valid, column, num_edges, M, BLOCK_R, FOLD, ACC)


@triton.jit
def _first_layer_gradient(
    grad, w, grad_pre, stride, grad_near, row, valid, num_edges,
    HALF: tl.constexpr, C: tl.constexpr, M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, FOLD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Replace the first layer's sums by their gradients, from those of the second layer's output."""
    tl.debug_barrier()  # the product reads what other threads of the program have stored
    for start in range(0, C, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        g_hidden = tl.zeros((BLOCK_R, BLOCK_N), ACC)
        g_hidden = _product(g_hidden, grad, row, valid, w, C, 1, column, C, BLOCK_K, ACC, PRECISION)
        at = grad_pre + row[:, None] * stride + (HALF * C + column)[None, :]
        pre = tl.load(at, mask=valid[:, None], other=0.0).to(ACC)
        sigmoid = tl.sigmoid(pre)
        g_pre = (g_hidden * (sigmoid * (1.0 + pre * (1.0 - sigmoid)))).to(grad_pre.dtype.element_ty)
        tl.store(at, g_pre, mask=valid[:, None])
        if FOLD:
            place = (1 + HALF) * C + column
            _store(grad_near, 3 * C, g_pre, row, valid, place, num_edges, M, BLOCK_R, FOLD, ACC)


@triton.jit(do_not_specialize=["num_edges"])
def backward_values_kernel(
    grad, x, weight, near, near_index, far, far_index, value_w, value_b, keys, mean, inv_std, norm_w, norm_b,
    grad_norm, grad_value, hiddens, grad_pre, grad_near, sums, num_edges,
    C: tl.constexpr, M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, SCALE: tl.constexpr, PRE_STRIDE: tl.constexpr, FOLD: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the norm's output and of the value network, and each tile's column sums of the former."""
    edge, row, near_row, far_row, valid = _tile_rows(near_index, far_index, num_edges, M, BLOCK_R)
    dtype = x.dtype.element_ty
    inside = valid[:, None]
    # What is needed later waits where its gradient will stand: first layers' sums, and values.
    _hidden_to_memory(
        hiddens, grad_pre, PRE_STRIDE, x, weight, near, far, row, near_row, far_row, valid,
        1, C, BLOCK_K, BLOCK_N, ACC, PRECISION,
    )  # fmt: skip
    for start in range(0, C, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        value = tl.zeros((BLOCK_R, BLOCK_N), ACC)
        value = _product(value, hiddens, row, valid, value_w, 1, C, column, C, BLOCK_K, ACC, PRECISION)
        value += tl.load(value_b + column)[None, :]
        tl.store(grad_value + row[:, None] * C + column[None, :], value.to(dtype), mask=inside)
    tl.debug_barrier()
    tile = tl.program_id(0).to(tl.int64) * (3 * C)
    for start in range(0, C, BLOCK_E):
        column = start + tl.arange(0, BLOCK_E)
        at = row[:, None] * C + column[None, :]
        value = tl.load(grad_value + at, mask=inside, other=0.0).to(ACC)
        _key, _query, standard = _standardise(
            keys, near, mean, inv_std, row, near_row, valid, column, C, SCALE, ACC
        )  # fmt: skip
        gate = tl.sigmoid(standard * tl.load(norm_w + column)[None, :] + tl.load(norm_b + column)[None, :])
        g = tl.load(grad + edge[:, None] * C + column[None, :], mask=inside, other=0.0).to(ACC)
        g_value = gate * g
        g_norm = g_value * value * (1.0 - gate)
        tl.store(grad_value + at, g_value.to(dtype), mask=inside)
        tl.store(grad_norm + at, g_norm.to(dtype), mask=inside)
        tl.store(sums + tile + column, tl.sum(g_norm, 0))
        tl.store(sums + tile + C + column, tl.sum(g_norm * standard, 0))
        tl.store(sums + tile + 2 * C + column, tl.sum(g_value, 0))
    _first_layer_gradient(
        grad_value, value_w, grad_pre, PRE_STRIDE, grad_near, row, valid, num_edges,
        1, C, M, BLOCK_R, BLOCK_K, BLOCK_N, FOLD, ACC, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_edges"])
def backward_keys_kernel(
    x, weight, near, near_index, far, far_index, key_w, keys, mean, inv_std, scale, shift, slope,
    grad_norm, hiddens, grad_pre, grad_query, grad_near, sums, num_counted, num_edges,
    C: tl.constexpr, M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr, SCALE: tl.constexpr, PRE_STRIDE: tl.constexpr, QUERY_STRIDE: tl.constexpr,
    FOLD: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries and the key network; the keys' own replaces `grad_norm`.

    Through BatchNorm the gradient of query · key / √C is scale · (grad_norm − shift − slope · standardised)
    for edges that count, and zero for others.
    """
    edge, row, near_row, far_row, valid = _tile_rows(near_index, far_index, num_edges, M, BLOCK_R)
    dtype = x.dtype.element_ty
    inside = valid[:, None]
    _hidden_to_memory(
        hiddens, grad_pre, PRE_STRIDE, x, weight, near, far, row, near_row, far_row, valid,
        0, C, BLOCK_K, BLOCK_N, ACC, PRECISION,
    )  # fmt: skip
    counted = valid if num_counted is None else valid & (edge < tl.load(num_counted))
    tile = tl.program_id(0).to(tl.int64) * C
    for start in range(0, C, BLOCK_E):
        column = start + tl.arange(0, BLOCK_E)
        at = grad_norm + row[:, None] * C + column[None, :]
        key, query, standard = _standardise(
            keys, near, mean, inv_std, row, near_row, valid, column, C, SCALE, ACC
        )  # fmt: skip
        g = tl.load(at, mask=inside, other=0.0).to(ACC)
        g -= tl.load(shift + column)[None, :] + tl.load(slope + column)[None, :] * standard
        g = tl.where(counted[:, None], g * tl.load(scale + column)[None, :], 0.0)
        g_key = g * query
        tl.store(sums + tile + column, tl.sum(g_key, 0))
        tl.store(at, g_key.to(dtype), mask=inside)
        g_query = (g * key * SCALE).to(dtype)
        _store(grad_query, QUERY_STRIDE, g_query, row, valid, column, num_edges, M, BLOCK_R, FOLD, ACC)
    _first_layer_gradient(
        grad_norm, key_w, grad_pre, PRE_STRIDE, grad_near, row, valid, num_edges,
        0, C, M, BLOCK_R, BLOCK_K, BLOCK_N, FOLD, ACC, PRECISION,
    )  # fmt: skip


FOLDED = (torch.bfloat16,)
"""Types whose sum over an edge's keys is a product with ones and zeros; wide ones would need three."""


@dataclass(frozen=True)
class Tile:
    """Shape of a kernel's tile: rows, steps over summed and over computed channels; warps and stages."""

    rows: int
    k: int
    n: int
    warps: int
    stages: int


# Chosen so that nothing spills and shared memory suffices on compute capability 8.0 and 9.0. The forward
# kernels keep a tile's hidden layer in registers where that leaves tiles of a useful size; the others are
# chosen by the bytes of a number.
_IN_REGISTERS = {128: Tile(128, 64, 64, 8, 3), 256: Tile(128, 32, 32, 8, 2)}
_THROUGH_MEMORY = {2: Tile(128, 64, 64, 8, 3), 4: Tile(64, 32, 64, 8, 3), 8: Tile(64, 16, 32, 8, 1)}
_THROUGH_MEMORY_80 = _THROUGH_MEMORY | {2: Tile(128, 64, 64, 8, 2), 4: Tile(64, 32, 32, 8, 3)}


def _tile(channels: int, dtype: torch.dtype, device: torch.device, *, forward: bool) -> tuple[Tile, bool]:
    """Choose a tile, and whether hidden layers stay in registers."""
    if INTERPRETED:  # few programs, and each way is tried
        step = min(channels, 32)
        return Tile(64, step, step, 4, 1), forward and channels < 32
    if forward and dtype == torch.bfloat16 and channels in _IN_REGISTERS:
        return _IN_REGISTERS[channels], True
    tile = (_THROUGH_MEMORY if target_arch(device) >= 90 else _THROUGH_MEMORY_80)[dtype.itemsize]
    return replace(tile, k=min(tile.k, channels), n=min(tile.n, channels)), False


class _Launcher:
    """What the four kernels share: sizes, the graph's rows and the compile-time arguments."""

    def __init__(self, x, weight, near, near_index, far, far_index, *, forward):
        self.num_edges, self.num_keys, self.channels = x.shape
        self.num_rows = self.num_edges * self.num_keys
        self.tile, self.in_registers = _tile(self.channels, x.dtype, x.device, forward=forward)
        tile = self.tile
        self.edges = tile.rows // self.num_keys
        self.num_tiles = triton.cdiv(self.num_edges, self.edges)
        self.fold = self.num_keys > 1 and x.dtype in FOLDED
        self.inputs = (x, weight, near, near_index, far, far_index)
        self.accumulator = accumulator_dtype(x.dtype)
        self.constants = {
            "C": self.channels,
            "M": self.num_keys,
            "BLOCK_R": tile.rows,
            "BLOCK_K": tile.k,
            "BLOCK_N": tile.n,
            "SCALE": self.channels**-0.5,
            "ACC": tl.float64 if self.accumulator == torch.float64 else tl.float32,
            "PRECISION": dot_precision() if x.dtype == torch.float32 else "ieee",
        }

    def __call__(self, kernel, *args, **constants):
        options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
        launch(kernel, (self.num_tiles,), *args, self.num_edges, **self.constants, **constants, **options)

    def hiddens(self) -> torch.Tensor | None:
        """Room for a hidden layer, if it goes through memory."""
        return None if self.in_registers else torch.empty_like(self.inputs[0])

    def partial(self, *shape: int) -> torch.Tensor:
        """Room for what every tile adds up for itself."""
        return torch.empty(self.num_tiles, *shape, dtype=self.accumulator, device=self.inputs[0].device)

    def pre(self, grad_near: torch.Tensor, grad_pre: torch.Tensor | None) -> torch.Tensor:
        """Room for the gradients of the first layers' sums."""
        return grad_near[:, self.channels :] if grad_pre is None else grad_pre

    def backward_constants(self, grad_near: torch.Tensor, grad_pre: torch.Tensor | None) -> dict:
        """Compile-time arguments of both backward kernels; elementwise steps take many arrays at once."""
        stride = self.pre(grad_near, grad_pre).stride(0)
        return {"PRE_STRIDE": stride, "BLOCK_E": min(self.channels, 32), "FOLD": self.fold}

    def merge(
        self, means: torch.Tensor, squares: torch.Tensor, num_counted: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and biased variance over all rows that count from those of the tiles (Chan et al. 1979)."""
        first = torch.arange(self.num_tiles, device=means.device) * self.edges
        edges = self.num_edges if num_counted is None else num_counted
        count = (edges - first).clamp(0, self.edges)[:, None].to(means.dtype) * self.num_keys
        total = edges * self.num_keys
        total = max(total, 1) if num_counted is None else total.clamp(min=1)
        mean = (means * count).sum(0) / total
        return mean, (squares.sum(0) + ((means - mean).square() * count).sum(0)) / total


def forward_keys(x, weight, near, near_index, far, far_index, key_w, key_b, statistics, num_counted):
    """Return the keys (E, M, C) and, if wanted, mean and biased variance of the products, (C,) each."""
    run = _Launcher(x, weight, near, near_index, far, far_index, forward=True)
    keys = torch.empty_like(x)
    means, squares = (run.partial(run.channels) if statistics else None for _ in range(2))
    run(
        keys_kernel, *run.inputs, key_w, key_b, run.hiddens(), keys, means, squares, num_counted,
        STATISTICS=statistics,
    )  # fmt: skip
    return [keys, *run.merge(means, squares, num_counted)] if statistics else [keys]


def forward_values(
    x, weight, near, near_index, far, far_index, value_w, value_b, keys, mean, inv_std, norm_w, norm_b
):
    """Return the gated values' sum over each edge's keys, (E, C)."""
    run = _Launcher(x, weight, near, near_index, far, far_index, forward=True)
    out = x.new_empty(run.num_edges, 1 if run.fold else run.num_keys, run.channels)
    run(
        values_kernel, *run.inputs, value_w, value_b, run.hiddens(),
        keys, mean, inv_std, norm_w, norm_b, out, FOLD=run.fold,
    )  # fmt: skip
    return out.sum(1) if out.shape[1] > 1 else out.squeeze(1)


def backward_values(
    grad, grad_near, grad_pre, x, weight, near, near_index, far, far_index,
    value_w, value_b, keys, mean, inv_std, norm_w, norm_b,
):  # fmt: skip
    """Gradients from the output to the value network, and the sums that those behind the norm need.

    Args:
        grad: gradient of the output, (E, C).
        grad_near: room for the gradients of the near rows, (E, 3C), of which the value part is written.
        grad_pre: room for those of the first layers' sums, (E·M, 2C), likewise; with M = 1 they are the near
            rows' last 2C columns, and this is None.

    Returns:
        Gradient of the norm's output, (E·M, C); that of value_w; sums over rows of the first, of the first
        times the standardised product, and of the values' gradients, (3, C).
    """
    run = _Launcher(x, weight, near, near_index, far, far_index, forward=False)
    grad_norm, grad_value, hiddens = (x.new_empty(run.num_rows, run.channels) for _ in range(3))
    sums = run.partial(3, run.channels)
    run(
        backward_values_kernel, grad, *run.inputs, value_w, value_b, keys, mean, inv_std, norm_w, norm_b,
        grad_norm, grad_value, hiddens, run.pre(grad_near, grad_pre), grad_near, sums,
        **run.backward_constants(grad_near, grad_pre),
    )  # fmt: skip
    return grad_norm, grad_value.t() @ hiddens, sums.sum(0)


def backward_keys(
    grad_norm, grad_near, grad_pre, x, weight, near, near_index, far, far_index,
    key_w, keys, mean, inv_std, norm_w, averages, num_counted,
):  # fmt: skip
    """Complete `grad_near` and `grad_pre` in place and return the gradients of x, weight, key_w and key_b.

    Args:
        grad_norm, grad_near, grad_pre: from `backward_values`; the first is used up.
        averages: the first two sums, over all rows that the statistics were taken over, by their number.
    """
    run = _Launcher(x, weight, near, near_index, far, far_index, forward=False)
    constants = run.backward_constants(grad_near, grad_pre)
    grad_pre = run.pre(grad_near, grad_pre)
    # Where the kernel does not sum over an edge's keys, the queries' gradients come one a row.
    apart = run.num_keys > 1 and not run.fold
    grad_query = x.new_empty(run.num_rows, run.channels) if apart else grad_near
    hiddens, sums = x.new_empty(run.num_rows, run.channels), run.partial(run.channels)
    run(
        backward_keys_kernel, *run.inputs, key_w, keys, mean, inv_std, norm_w * inv_std, *averages,
        grad_norm, hiddens, grad_pre, grad_query, grad_near, sums, num_counted,
        QUERY_STRIDE=grad_query.stride(0), **constants,
    )  # fmt: skip
    if apart:
        by_edge = (run.num_edges, run.num_keys)
        torch.sum(grad_query.unflatten(0, by_edge), 1, out=grad_near[:, : run.channels])
        torch.sum(grad_pre.unflatten(0, by_edge), 1, out=grad_near[:, run.channels :])
    grad_key = grad_norm  # the kernel has replaced one by the other
    return (
        (grad_pre @ weight).view_as(x),
        grad_pre.t() @ x.view(run.num_rows, run.channels),
        grad_key.t() @ hiddens,
        sums.sum(0),
    )
