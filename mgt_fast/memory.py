"""What a training step takes of a device's memory, counted from the arrays that it holds.

A step's peak lies in its backward pass: all that the layers keep, and what one of them works with. Layers
that are computed again (`MGT.recompute`) keep their output alone, and one of them at a time what it keeps and
works with. In numbers an edge, with C channels, ns scalars and nv vectors:

                          kept besides the output                at work in the backward pass
    torch
    edge-wise attention   near rows 3 C, first layers' sums      gradients of the sums 6 C, of x 3 C, of near
                          6 C, keys and values 6 C, sum and its  rows 3 C, of the outputs 4 C, of angles and
                          projection 2 C                         edges, which add up over layers, 4 C
    node-wise attention   sums 2 C, keys and values 2 C          of sums, messages, x and edges 6 C
    equivariant           hidden 2 C, 3 ns + 28 nv + 20          hidden, grouped by atom, and gradients 6 C,
                                                                 3 ns + 28 nv + 20
      an atom             (2 ns + 4 nv) C: hidden ⊗ features     half as many
    triton
    edge-wise attention   near rows 3 C, keys 3 C, sum and its   hidden and its gradients 21 C, of the outputs
                          projection 2 C                         3 C, of angles and edges 4 C
    node-wise attention   keys C                                 hidden and its gradients 8 C
    equivariant           hidden 2 C                             gradients 3 C, ns + 2 nv

The edge-wise layer's output is C an edge, that of the others C an atom; of an atom the node-wise layer keeps
some 10 C more. The embeddings' outputs are C an edge in either view, and 3 C for the angles. Torch keeps the
places and values of thirteen basis functions of each embedded number, `BASIS_BYTES`, and under autocast
bfloat16 copies of what comes in float32: of x 3 C and edges C in the edge-wise layer, C in the node-wise, 2 C
in the equivariant one.

For torch the counts are compared with what its allocator hands out (tests/test_memory.py), and lie above it:
not all of this is held at once, and no allocator can use every gap. Those for Triton, made in the same way,
are not measured: no GPU has run them yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from .config import MGTConfig

WIDE = 4
"""Bytes of a number that is not multiplied: of sums, features and geometry."""

BASIS_BYTES = 300
"""What torch keeps of one number's radial basis: indices twice, and the basis."""

ATOM_ROWS = 10
"""Rows of C numbers that a node-wise layer keeps of an atom."""


@dataclass(frozen=True)
class _Layer:
    """Bytes an edge: of the output, of what else is kept, and of what the backward pass works with."""

    output: float
    kept: float
    working: float


def bytes_per_edge(
    config: MGTConfig,
    backend: str,
    precision: str,
    recompute: bool = False,
    *,
    edges_per_atom: float = 25.0,
) -> float:
    """Return how many bytes a training step takes at its peak for each edge of its batch.

    Parameters, their gradients and the optimiser's state come on top; they do not grow with the batch.

    Args:
        config: sizes of the network.
        backend: "torch" or "triton", which keeps less.
        precision: "float32", "tf32" or "bf16".
        recompute: whether layers are computed again in the backward pass.
        edges_per_atom: directed edges a receiving atom, at least; the graphs' `max_neighbors`.
    """
    size = 2 if precision == "bf16" else 4
    count = _torch_layers if backend == "torch" else _triton_layers
    layers = count(config, size, edges_per_atom)
    if recompute:
        return sum(layer.output for layer in layers) + max(layer.kept + layer.working for layer in layers)
    return sum(layer.output + layer.kept for layer in layers) + max(layer.working for layer in layers)


def _torch_layers(config: MGTConfig, size: int, edges_per_atom: float) -> list[_Layer]:
    C, ns, nv = config.channels, config.num_scalars, config.num_vectors
    copies = size < WIDE  # autocast casts what comes in float32
    atom = C * WIDE / edges_per_atom
    node_wise = _Layer(atom, (4 + copies) * C * size + ATOM_ROWS * atom, 5 * C * size + C * WIDE)
    layers = []
    if config.views != "so3":
        kept = (17 + 4 * copies) * C * size
        working = 14 * C * size + (6 + 3 * copies) * C * WIDE
        edge_wise = _Layer(C * WIDE, kept, working)
        layers += [_Layer(4 * (C * WIDE + BASIS_BYTES), 0, 0), *[edge_wise, node_wise] * config.num_blocks]
    if config.views != "se3":
        features = (3 * ns + 28 * nv + 20) * WIDE
        products = (2 * ns + 4 * nv) * C * size / edges_per_atom
        kept = (2 + 2 * copies) * C * size + features + products
        equivariant = _Layer(atom, kept, 5 * C * size + C * WIDE + features + products / 2)
        layers += [_Layer(2 * C * WIDE + BASIS_BYTES, 0, 0), *[equivariant, node_wise] * config.num_blocks]
    return layers + _edge_heads(config, size, 4)


def _triton_layers(config: MGTConfig, size: int, edges_per_atom: float) -> list[_Layer]:
    C, features = config.channels, config.num_scalars + 2 * config.num_vectors
    atom = C * WIDE / edges_per_atom
    node_wise = _Layer(atom, C * size + ATOM_ROWS * atom, 8 * C * size)
    layers = []
    if config.views != "so3":
        edge_wise = _Layer(C * size, 8 * C * size, 28 * C * size)
        layers += [_Layer(4 * (C * size + WIDE), 0, 0), *[edge_wise, node_wise] * config.num_blocks]
    if config.views != "se3":
        equivariant = _Layer(atom, 2 * C * size + atom, (3 * C + features) * size)
        layers += [_Layer(C * size + WIDE, 0, 0), *[equivariant, node_wise] * config.num_blocks]
    return layers + _edge_heads(config, size, size)


def _edge_heads(config: MGTConfig, size: int, wide: int) -> list[_Layer]:
    """Heads that predict the noise of each edge: hidden layers of the edge, or of its three directions."""
    if config.task != "pretrain" or config.denoising != "edge":
        return []
    rows = {"se3": [3], "so3": [1], "both": [3, 1]}[config.views]
    C = config.channels
    return [_Layer(0, n * C * (size + wide), (2 * n + 3) * C * wide) for n in rows]


def memory_limit(device: torch.device) -> float:
    """Return how many bytes of a device a process may plan with, unless it is told.

    85 % of a GPU's memory: parameters, their gradients and the optimiser's state come out of the other 15 %,
    with the CUDA context and what the allocator cannot use. On a CPU half of the machine's memory, or of what
    the process's control groups grant if that is less, divided by the processes that torchrun has started.
    """
    if device.type == "cuda":
        return 0.85 * torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = min([machine, *cgroup_limits()])
    return machine / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def cgroup_limits(process: Path = Path("/proc/self")) -> Iterator[int]:
    """Yield the memory limits of a process's control group and all above it, versions 1 and 2, in bytes.

    Containers and batch systems set them, anywhere on the way up; who exceeds one is killed. Nothing is
    yielded where there are none, or no control groups.

    Args:
        process: its folder in /proc.

    Source: cgroups(7), proc_pid_mountinfo(5).
    """
    try:
        groups = (process / "cgroup").read_text().splitlines()
        mounts = (process / "mountinfo").read_text().splitlines()
    except OSError:  # no Linux, or hidden
        return
    paths = {}  # of the process's group, by kind of mount
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "memory" in controllers.split(","):
            paths["cgroup"] = path
    for mount in mounts:
        place, _, source = mount.partition(" - ")
        root, top = place.split()[3:5]
        kind, *_, options = source.split()
        if kind not in paths or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        path = PurePosixPath(paths[kind])
        # A group that lies outside of what is mounted is seen from its mount's top alone.
        below = path.relative_to(root).parts if path.is_relative_to(root) else ()
        for depth in range(len(below) + 1):
            folder = Path(top, *below[:depth])
            for name in ("memory.max", "memory.limit_in_bytes"):
                try:
                    text = (folder / name).read_text().strip()
                except OSError:
                    continue
                if text != "max":
                    yield int(text)
