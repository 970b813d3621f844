"""A training step and a prediction of MGT beside the plain PyTorch + e3nn reference, at published sizes.

Before anything is timed the two are given the same weights and must give the same losses, gradients and
predictions. Peak memory is that of one training step in a process of its own, above what model, graph,
gradients and optimiser state take. The numbers in brackets behind the medians are the ratios to the rival.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import real_graph

from mgt_fast import MGT, MGTConfig
from mgt_fast.losses import draw_noise, pretraining_loss
from mgt_fast.reference import ReferenceMGT

MODELS = {"reference": ReferenceMGT, "torch": MGT}
CONFIGS = {"training step": MGTConfig(task="pretrain", dropout=0.0), "prediction": MGTConfig(dropout=0.0)}


def make(name, config):
    """Build a model with the weights that every rival starts from."""
    torch.manual_seed(0)
    state = ReferenceMGT(config).state_dict()
    model = MODELS[name](config)
    model.load_state_dict(state)
    return model


def pretraining(model, graph):
    """Return a function that computes the pretraining loss with fixed noise."""
    noise = draw_noise(graph, 0.05, torch.Generator().manual_seed(0))
    return lambda: pretraining_loss(model(graph, noise), graph, noise).total


def training_step(model, graph):
    """Return a function that does one pretraining step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    loss = pretraining(model, graph)

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    return step


def prediction(model, graph):
    """Return a function that predicts."""
    model.eval()

    @torch.inference_mode()
    def predict():
        return model(graph).prediction

    return predict


def peak_memory(name, num_edges):
    """Return bytes an edge that one training step takes (Linux; run it in a process of its own)."""
    model = make(name, CONFIGS["training step"])
    training_step(model, real_graph(1))()  # makes gradients and optimiser state
    graph = real_graph(num_edges)
    step = training_step(model, graph)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmHWM")
    step()
    return (resident("VmHWM") - before) / graph.num_edges


def resident(entry):
    """Return an entry of this process's memory status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry))


@pytest.fixture(scope="module", autouse=True)
def same_answers(graph):
    """Compare losses, predictions and the whole gradient of the rivals before they are timed."""
    losses, gradients, predictions = [], [], []
    for name in MODELS:
        model = make(name, CONFIGS["training step"])
        loss = pretraining(model, graph)()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({key: p.grad for key, p in model.named_parameters()})
        predictions.append(prediction(make(name, CONFIGS["prediction"]), graph)())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    torch.testing.assert_close(*predictions, rtol=1e-4, atol=1e-5)
    reference, ours = gradients
    norm = torch.stack([g.norm() for g in reference.values()]).norm()
    error = torch.stack([(ours[key] - g).norm() for key, g in reference.items()]).norm()
    assert error < 1e-3 * norm, (error, norm)


@pytest.mark.parametrize("name", MODELS)
def bench_training_step(benchmark, graph, name):
    benchmark.group = "training step, C = 256, float32"
    benchmark.extra_info["edges"] = graph.num_edges
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        benchmark.extra_info["bytes_per_edge"] = pool.submit(peak_memory, name, 10_000).result()
    step = training_step(make(name, CONFIGS["training step"]), graph)
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    benchmark.extra_info["us_per_edge"] = benchmark.stats["median"] / graph.num_edges * 1e6


@pytest.mark.parametrize("name", MODELS)
def bench_prediction(benchmark, graph, name):
    benchmark.group = "prediction, C = 256, float32"
    benchmark.extra_info["edges"] = graph.num_edges
    predict = prediction(make(name, CONFIGS["prediction"]), graph)
    benchmark.pedantic(predict, rounds=5, warmup_rounds=1)
    benchmark.extra_info["us_per_edge"] = benchmark.stats["median"] / graph.num_edges * 1e6
