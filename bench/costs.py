"""What each operation must do at least: floating-point operations, and bytes through device memory.

Operations are counted as the merged algebra asks for them, a multiplication and an addition as two, each
once: what a kernel computes again in order not to store it does not count, nor do elementwise functions.
Bytes are those of every input read once and every output written once. No implementation is faster than the
larger of flops / rate and bytes / bandwidth; a kernel's share of that bound is what it achieves.

    operation          FLOP forward                            numbers forward, weights and indices apart
    rbf_embedding      2·13·C an embedded number               C + 1 an embedded number
    edge_attention     30 C² an edge                           5 C an edge
    node_attention     8 C² an edge, 10 C² an atom             C an edge, 2 C an atom
    tensor_product_1   2·C·(ns + 2 nv) an edge,                C + 3 an edge,
                       2·C·ns·(ns + 2 nv) an atom              2 ns + 8 nv an atom
    tensor_product_2   2·C·(ns + 2 nv) an edge,                C + 3 an edge,
                       2·C·ns·(ns + 2 nv) an atom              2 ns + 8 nv an atom
    residual_norm      -                                       3 C a row
    segment_sum        C a row                                 C a row, C a segment

The backward pass has two products for each of the forward pass; it reads the inputs and the gradient of the
output, and writes the gradients of the inputs. Letters: N atoms, E edges, B crystals, C channels, ns scalar
and nv vector channels, s bytes a number.
"""

from __future__ import annotations

from dataclasses import dataclass

from mgt_fast.roofs import RBF_TERMS, Cost

INDEX = 8  # bytes of an int64
GEOMETRY = 4  # bytes of a coordinate, float32 in every precision


@dataclass(frozen=True)
class Sizes:
    """Sizes of a batch and of the network; `itemsize` is s."""

    num_atoms: int
    num_edges: int
    num_crystals: int
    channels: int = 256
    num_scalars: int = 64
    num_vectors: int = 8
    num_blocks: int = 2
    itemsize: int = 2


@dataclass(frozen=True)
class Operation:
    """What an operation reads and writes, in bytes, and its forward operations.

    Attributes:
        flops: of the forward pass.
        inputs: bytes of the inputs that have a gradient.
        outputs: bytes of the outputs.
        constants: bytes of the other inputs.
        linear: whether the backward pass only spreads the gradient, without products and without the inputs.
    """

    flops: float
    inputs: float
    outputs: float
    constants: float = 0.0
    linear: bool = False

    @property
    def forward(self) -> Cost:
        """Cost of the forward pass."""
        return Cost(self.flops, self.inputs + self.constants + self.outputs)

    @property
    def backward(self) -> Cost:
        """Cost of the backward pass."""
        if self.linear:
            return Cost(0.0, self.inputs + self.constants + self.outputs)
        return Cost(2 * self.flops, 2 * self.inputs + self.constants + self.outputs)


def rbf_embedding(sizes: Sizes, rows: int) -> Operation:
    """Linear(RBF(x)) of `rows` numbers x that have no gradient."""
    C, s = sizes.channels, sizes.itemsize
    return Operation(
        flops=2 * RBF_TERMS * C * rows,
        inputs=GEOMETRY * (C + 1) * C,
        outputs=s * rows * C,
        constants=GEOMETRY * rows,
    )


def edge_attention(sizes: Sizes) -> Operation:
    """Products per edge: C → 3C once, and C → 2C and twice C → C for each of three directions."""
    E, C, s = sizes.num_edges, sizes.channels, sizes.itemsize
    return Operation(
        flops=2 * E * (3 + 3 * (2 + 2)) * C**2,
        inputs=s * (4 * E * C + 6 * sizes.num_crystals * C + 7 * C**2),
        outputs=s * E * C,
        constants=INDEX * E,
    )


def node_attention(sizes: Sizes) -> Operation:
    """Products: C → 2C and twice C → C per edge, C → 5C per atom."""
    N, E, C, s = sizes.num_atoms, sizes.num_edges, sizes.channels, sizes.itemsize
    return Operation(
        flops=2 * E * 4 * C**2 + 2 * N * 5 * C**2,
        inputs=s * (E * C + N * C + 9 * C**2),
        outputs=s * N * C,
        constants=INDEX * 2 * E,
    )


def _tensor_product(sizes: Sizes, inputs: int, outputs: int) -> Operation:
    """Both products: ns + 2 nv features an edge times K = C hidden channels, contracted to or from atoms."""
    N, E, K, s = sizes.num_atoms, sizes.num_edges, sizes.channels, sizes.itemsize
    features = sizes.num_scalars + 2 * sizes.num_vectors
    return Operation(
        flops=2 * (E + N * sizes.num_scalars) * K * features,
        inputs=s * (E * K + N * inputs + sizes.num_scalars * features * (K + 1)),
        outputs=s * N * outputs,
        constants=(2 * INDEX + 3 * GEOMETRY) * E,
    )


def tensor_product_1(sizes: Sizes) -> Operation:
    """ns scalars an atom to ns + 8 nv numbers."""
    return _tensor_product(sizes, sizes.num_scalars, sizes.num_scalars + 8 * sizes.num_vectors)


def tensor_product_2(sizes: Sizes) -> Operation:
    """ns + 8 nv numbers an atom to ns scalars."""
    return _tensor_product(sizes, sizes.num_scalars + 8 * sizes.num_vectors, sizes.num_scalars)


def residual_norm(sizes: Sizes, rows: int) -> Operation:
    """softplus(x + BN(y)) of (rows, C) arrays: no products."""
    array = sizes.itemsize * rows * sizes.channels
    return Operation(flops=0.0, inputs=2 * array, outputs=array)


def segment_sum(sizes: Sizes, rows: int, segments: int) -> Operation:
    """Sum of (rows, C) to (segments, C)."""
    C, s = sizes.channels, sizes.itemsize
    return Operation(
        flops=rows * C,
        inputs=s * rows * C,
        outputs=s * segments * C,
        constants=INDEX * (rows + segments),
        linear=True,
    )


def model_flops(sizes: Sizes) -> float:
    """Operations of one forward pass of both encoders; a training step has three times as many.

    At C = 256 and 28 edges an atom these are 7.5 · 10⁶ an edge, and 22.5 · 10⁶ a step.
    """
    N, E, C = sizes.num_atoms, sizes.num_edges, sizes.channels
    projection = 2 * C**2  # C → C of one row
    se3 = edge_attention(sizes).flops + projection * E + node_attention(sizes).flops + projection * N
    so3 = (
        tensor_product_1(sizes).flops
        + tensor_product_2(sizes).flops
        + 2 * projection * E  # first layers of the two weight networks
        + 2 * 2 * N * C * sizes.num_scalars
        + node_attention(sizes).flops
        + projection * N
    )
    embeddings = rbf_embedding(sizes, 5 * E).flops  # lengths for either view, and three angles
    return sizes.num_blocks * (se3 + so3) + embeddings
