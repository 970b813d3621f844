"""What every benchmark shares: real crystals, and what the machine is."""

from __future__ import annotations

import platform

import numpy as np
import pytest
import torch

from mgt_fast import build_graph
from mgt_fast.data import CrystalDataset


def device_name() -> str:
    """Name the processor that computes."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as lines:
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), None)
    return f"{model or platform.processor()}, {torch.get_num_threads()} threads"


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["device"] = device_name()
    machine_info["torch"] = torch.__version__


def real_graph(num_edges: int, dtype: torch.dtype = torch.float32):
    """Graph of bundled crystals in a fixed random order, at least `num_edges` edges."""
    dataset = CrystalDataset.open(None)
    order = np.random.default_rng(0).permutation(len(dataset))
    count = max(1, num_edges // 400)
    while (graph := build_graph(dataset.gather(order[:count]))).num_edges < num_edges:
        count = max(count + 1, int(count * 1.05 * num_edges / graph.num_edges))
    return graph.to(dtype=dtype)


@pytest.fixture(scope="session")
def graph():
    return real_graph(10_000)
