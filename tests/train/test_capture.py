"""Padded and captured steps beside ordinary ones."""

import copy

import numpy as np
import pytest
import torch

from mgt_fast import MGT, MGTConfig
from mgt_fast.data import CrystalDataset
from mgt_fast.train import capture
from mgt_fast.train.batches import GraphSource
from mgt_fast.train.capture import CapturedStep, PaddedStep
from mgt_fast.train.config import ConfigError, FinetuneConfig, OptimConfig
from mgt_fast.train.finetune import FinetuneTask
from mgt_fast.train.step import TrainingStep
from mgt_fast.train.targets import TargetScaling

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
BATCHES = [[0, 1, 2], [3, 4], [5, 6, 7], [0, 1, 2], [3, 4], [1, 2, 0], [5, 6, 7], [3, 4]]
OPTIM = OptimConfig(lr=1e-3, epochs=1, warmup_epochs=0, batch_size=3, grad_clip=1.0)


@pytest.fixture(scope="module")
def dataset():
    return CrystalDataset.open(None)


def make_task(dataset, *, device="cpu", backend="torch", loss="mse", **network):
    torch.manual_seed(0)
    sizes = {"channels": 16, "num_scalars": 8, "num_vectors": 2, "num_blocks": 1, "expert_hidden": 8}
    network = MGTConfig(**({**sizes, "dropout": 0.0} | network))
    config = FinetuneConfig(model=network, optim=OPTIM, loss=loss, capture=True)
    # Small crystals of different sizes.
    chosen = np.flatnonzero(np.diff(dataset.gather(np.arange(200)).batch_ptr.numpy()) <= 8)[:8]
    task = FinetuneTask(
        MGT(network, backend=backend).to(device),
        GraphSource(dataset, 6, None, torch.device(device)),
        np.linspace(-1, 2, 200),
        {"train": chosen},
        TargetScaling(0.5, 2.0),
        config,
    )
    return task, [chosen[batch] for batch in BATCHES]


def train(task, step, batches):
    """Loss, gradient norm and error of every step."""
    task.model.train()
    seen = []
    for i, indices in enumerate(batches):
        graph = task.graph(indices)
        if type(step) is TrainingStep:
            graph = graph.to(device=task.source.device)
        result = step.gradients(indices, graph)
        seen.append([float(value) for value in (result.loss, result.norm, result.figures["mae"])])
        step.update(1e-3 / (i + 1))
    return torch.tensor(seen), task.model.state_dict()


def assert_same(found, expected, rtol, atol):
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(found[1], expected[1], rtol=rtol, atol=atol)


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_padded_steps_train_as_ordinary_ones(dataset, loss):
    task, batches = make_task(dataset, loss=loss)
    task.model.double()
    padded_task = copy.copy(task)
    padded_task.model = copy.deepcopy(task.model)
    step = PaddedStep(padded_task, OPTIM)
    expected = train(task, TrainingStep(task, OPTIM), batches)
    assert_same(train(padded_task, step, batches), expected, rtol=1e-5, atol=1e-6)
    assert 1 < len(step.buckets) < len(batches)


def test_buckets_are_kept_for_a_while(dataset, monkeypatch):
    monkeypatch.setattr(capture, "MAX_BUCKETS", 1)
    task, batches = make_task(dataset)
    step = PaddedStep(task, OPTIM)
    train(task, step, batches[:3])
    assert len(step.buckets) == 1
    arrays = next(iter(step.buckets.values())).graph.edge_vec
    train(task, step, [batches[2]])
    assert next(iter(step.buckets.values())).graph.edge_vec is arrays


def test_crystals_without_statistics_are_named(dataset):
    task, batches = make_task(dataset)
    graph = task.graph(batches[0][:1])
    few = type(graph)(
        **{
            **vars(graph),
            "edge_index": graph.edge_index[:, :1],
            "edge_vec": graph.edge_vec[:1],
            "row_ptr": graph.row_ptr.clamp(max=1),
        }
    )
    with pytest.raises(ValueError, match=f"1 edges: batch statistics need at least 2 .*{graph.ids[0]}"):
        PaddedStep(task, OPTIM).gradients(batches[0][:1], few)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_nothing_is_captured_on_a_cpu(dataset, backend):
    task, _ = make_task(dataset, backend=backend)
    with pytest.raises(ConfigError, match=r"needs a CUDA device and the Triton .* cpu with .*torch"):
        CapturedStep(task, OPTIM)


@needs_cuda
def test_captured_steps_train_as_ordinary_ones(dataset):
    task, batches = make_task(dataset, device="cuda", backend="triton")
    captured_task = copy.copy(task)
    captured_task.model = copy.deepcopy(task.model)
    step = CapturedStep(captured_task, OPTIM)
    found, expected = train(captured_task, step, batches), train(task, TrainingStep(task, OPTIM), batches)
    assert_same(found, expected, rtol=1e-3, atol=1e-4)
    captured = [b for b in step.buckets.values() if b.gradients is not None]
    assert len(captured) >= 2


@needs_cuda
def test_dropout_differs_between_replays(dataset):
    task, batches = make_task(dataset, device="cuda", backend="triton", dropout=0.5)
    step = CapturedStep(task, OPTIM)
    losses = []
    for _ in range(6):
        losses.append(step.gradients(batches[0], task.graph(batches[0])).loss.item())
        step.update(0.0)
    assert len(set(losses[2:])) > 1


@needs_cuda
def test_a_loss_that_is_not_finite_spares_the_weights(dataset):
    task, batches = make_task(dataset, device="cuda", backend="triton")
    step = CapturedStep(task, OPTIM)
    train(task, step, [batches[0]] * 2)
    before = {name: p.clone() for name, p in task.model.named_parameters()}
    task.targets[batches[0]] = np.nan
    assert not step.gradients(batches[0], task.graph(batches[0])).loss.isfinite()
    for name, p in task.model.named_parameters():
        assert torch.equal(p, before[name])
