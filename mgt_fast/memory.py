"""What a training step takes of a device's memory, counted from the arrays that it holds.

A step's peak is reached in the backward pass: all that the layers keep, and what one of them works with. With
layers computed again (`MGT.recompute`) they keep their outputs alone, and one of them what it keeps and works
with. Counted below, in numbers an edge, C channels; `s` bytes have those that are multiplied, 2 under autocast
to bfloat16, `w` = 4 the others.

    torch                 kept                                        at work in the backward pass
    edge-wise attention   near 3 C, first layers' sums 6 C, keys and  gradients of sums 6 C, x 3 C, near 3 C, of
                          values 6 C, two outputs 2 C                 outputs 4 C; those of angles and edges that
                                                                      add up over the layers, 4 C
    node-wise attention   sums 2 C, keys and values 2 C               as many, and of edges 2 C
    equivariant           hidden 2 C, features 3 ns + 28 nv + 20      as many, and of edges 2 C; twice the atoms'
    an atom of it         (2 ns + 4 nv) C: products of hidden
                          channels and features

    triton
    edge-wise attention   near 3 C, keys 3 C, outputs 2 C             gradients and hidden layers 22 C, of outputs
                                                                      3 C, of angles and edges 4 C
    node-wise attention   keys C                                      8 C
    equivariant           hidden 2 C                                  4 C; features ns + 2 nv; 64 MiB in all

Under autocast torch keeps a copy of every input that it casts. The embeddings keep one row an edge and three
for its angles, and in torch thirteen basis functions of each with their places.

The figures for torch were compared with measurements on a CPU (tests/test_memory.py); equal lengths and angles,
which the CPU embeds once, make a step smaller. Those for Triton have not been measured: no GPU has run them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .config import MGTConfig


def memory_limit(device: torch.device) -> float:
    """Return how many bytes of a device a process may plan with, unless it is told.

    85 % of a GPU's memory; half of the machine's, divided by the processes that torchrun has started on it.
    """
    if device.type == "cuda":
        return 0.85 * torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
