"""A training step and a prediction of MGT beside the plain PyTorch + e3nn reference, at published sizes.

Before anything is timed the two are given the same weights and must give the same answer. Peak memory is
that of one training step in a process of its own, above what the loaded model and graph take.
"""

from __future__ import annotations

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor

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


def training_step(model, graph):
    """Return a function that does one pretraining step and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    noise = draw_noise(graph, 0.05, torch.Generator().manual_seed(0))

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = pretraining_loss(model(graph, noise), graph, noise).total
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def prediction(model, graph):
    """Return a function that predicts."""
    model.eval()

    @torch.inference_mode()
    def predict():
        return model(graph).prediction

    return predict


def peak_memory(name, num_edges):
    """Bytes an edge that one training step takes on top of model, graph and optimiser (own process)."""
    graph = real_graph(num_edges)
    step = training_step(make(name, CONFIGS["training step"]), graph)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (after - before) * 1024 / graph.num_edges


@pytest.fixture(scope="module", autouse=True)
def same_answers(graph):
    for work, run in (("training step", training_step), ("prediction", prediction)):
        ours, reference = (run(make(name, CONFIGS[work]), graph)() for name in ("torch", "reference"))
        torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(reference), rtol=1e-4, atol=1e-5)


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
