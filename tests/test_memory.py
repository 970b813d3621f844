"""What `bytes_per_edge` counts beside what torch's allocator hands out in a training step."""

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mgt_fast import MGT, CrystalBatch, MGTConfig, build_graph
from mgt_fast.losses import draw_noise
from mgt_fast.memory import bytes_per_edge

ATOMS = 16


def config(**changes):
    return MGTConfig(**({"task": "pretrain", "channels": 64, "dropout": 0.0} | changes))


def disorder(num_crystals):
    """Atoms at random, of which no two lengths or angles are equal."""
    atoms = ATOMS * num_crystals
    frac = np.random.default_rng(0).random((atoms, 3))
    cells = np.tile(6 * np.eye(3), (num_crystals, 1, 1))
    batch = CrystalBatch.from_arrays(np.full(atoms, 14), frac, cells, [ATOMS] * num_crystals)
    return build_graph(batch, max_neighbors=25).to(dtype=torch.float32)


def peak(step):
    """Most bytes that tensors made by `step` hold at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in changes]).max())


def measured(sizes, recompute, precision):
    """Growth of a step's peak by edge, so that parameters and their gradients do not count."""
    torch.manual_seed(0)
    model, peaks = MGT(sizes, backend="torch"), []
    model.recompute = recompute
    for graph in map(disorder, (2, 8)):
        noise = draw_noise(graph, 0.05, torch.arange(graph.num_crystals))

        def step(graph=graph, noise=noise):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                out = model(graph, noise)
            names = ("se3_proj", "so3_proj", "se3_noise", "so3_noise")
            values = [getattr(out, name) for name in names]
            sum(value.float().square().sum() for value in values if value is not None).backward()
            model.zero_grad()

        peaks.append((graph.num_edges, peak(step)))
    (few, low), (many, high) = peaks
    return (high - low) / (many - few)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("changes", "precision"),
    [
        ({}, "float32"),
        ({}, "bf16"),
        ({"views": "se3", "num_blocks": 3}, "float32"),
        ({"views": "so3", "num_scalars": 16}, "float32"),
        ({"denoising": "edge"}, "float32"),
    ],
    ids=str,
)
def test_counts_lie_above_measurements_and_not_far(changes, precision, recompute):
    sizes = config(**changes)
    ratio = bytes_per_edge(sizes, "torch", precision, recompute) / measured(sizes, recompute, precision)
    assert 1 <= ratio <= 1.5


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_computing_again_takes_less(backend):
    kept, again = (bytes_per_edge(config(), backend, "float32", recompute) for recompute in (False, True))
    assert again < 0.8 * kept
    deep = [
        bytes_per_edge(config(num_blocks=8), backend, "float32", recompute) for recompute in (False, True)
    ]
    assert deep[1] < 0.4 * deep[0]
