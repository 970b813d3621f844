"""Real crystals for the benchmarks."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from machine import device

from mgt_fast import CrystalGraph, build_graph
from mgt_fast.data import CrystalDataset


@lru_cache(maxsize=1)
def bundled_crystals() -> tuple[CrystalDataset, np.ndarray]:
    """The bundled set, and a fixed random order of it."""
    dataset = CrystalDataset.open(None)
    return dataset, np.random.default_rng(0).permutation(len(dataset))


@lru_cache(maxsize=4)
def real_graph(num_edges: int = 0, num_crystals: int = 1) -> CrystalGraph:
    """Graph of bundled crystals in a fixed random order, in float32 on the benchmarks' device.

    So many crystals as give at least `num_edges` edges, and at least `num_crystals`; the bundled set comes
    again where it does not suffice.
    """
    dataset, order = bundled_crystals()
    count = max(num_crystals, num_edges // 400)
    while (graph := build_graph(dataset.gather(order[np.arange(count) % len(order)]))).num_edges < num_edges:
        count = max(count + 1, int(count * 1.05 * num_edges / graph.num_edges))
    # A compiled model compares the names before every call; other names would have it compiled again.
    return replace(graph, ids=()).to(device=device(), dtype=torch.float32)
