"""Padded and captured steps beside ordinary ones."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from mgt_fast import MGT, CrystalGraph, MGTConfig, build_graph
from mgt_fast.data import CrystalDataset
from mgt_fast.kernels.random import fork_keys, stream_key
from mgt_fast.losses import mean_over_crystals
from mgt_fast.train import capture
from mgt_fast.train.capture import CapturedStep, PaddedStep
from mgt_fast.train.step import Batch, Chunk, ChunkLoss, TrainingStep

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
BATCHES = [[0, 1, 2], [3, 4], [5, 6, 7], [0, 1, 2], [3, 4], [1, 2, 0], [5, 6, 7], [3, 4]]
SMALL = {"channels": 16, "num_scalars": 8, "num_vectors": 2, "num_blocks": 1, "expert_hidden": 8}


@pytest.fixture(scope="module")
def graphs():
    """Eight small crystals of the bundled set in the batches of `BATCHES`, on the CPU."""
    dataset = CrystalDataset.open(None)
    small = np.flatnonzero(np.diff(dataset.gather(np.arange(200)).batch_ptr.numpy()) <= 8)
    return [build_graph(dataset.gather(small[batch]), 6).to(dtype=torch.float32) for batch in BATCHES]


@dataclass
class SmallTask:
    """Squared error of predictions; targets of crystal i are i."""

    model: MGT
    largest_batch: int = 3
    broken: bool = False
    compares_crystals = False

    def batch_targets(self, indices):
        return torch.tensor(indices, dtype=torch.float32) / (0 if self.broken else 1)

    def forward(self, batch, chunk):
        targets = self.batch_targets(chunk.crystals).to(chunk.graph.numbers.device)
        return ChunkLoss(*self.loss_of(chunk.graph, targets, chunk.keys))

    def loss_of(self, graph: CrystalGraph, targets, keys):
        error = self.model(graph, keys=keys).prediction.squeeze(1) - targets
        mae = mean_over_crystals(error.detach().abs(), graph)
        return mean_over_crystals(error.square(), graph), {"mae": mae}


def one_chunk(indices, graph, step=0):
    """A batch of one chunk, on the graph's device."""
    indices = np.asarray(indices)
    device = graph.numbers.device
    keys = fork_keys(torch.from_numpy(indices), stream_key(step)).to(device)
    chunk = Chunk(graph, indices, torch.arange(len(indices), device=device), keys)
    return Batch(1, step, len(indices), graph.num_edges, (chunk,))


def make_task(device="cpu", backend="torch", dropout=0.0):
    torch.manual_seed(0)
    return SmallTask(MGT(MGTConfig(**SMALL, dropout=dropout), backend=backend).to(device))


def train(step, graphs, batches=BATCHES):
    """Loss, gradient norm and error of every step, and what the network is afterwards."""
    step.task.model.train()
    device = step.parameters[0].device if type(step) is TrainingStep else None
    seen = []
    for i, (indices, graph) in enumerate(zip(batches, graphs, strict=False)):
        result = step.gradients(one_chunk(indices, graph.to(device=device), i))
        seen.append([float(value) for value in (result.loss, result.norm, result.figures["mae"])])
        step.update(1e-3 / (i + 1))
    return torch.tensor(seen), step.task.model.state_dict()


def test_padded_steps_train_as_ordinary_ones(graphs):
    task = make_task()
    task.model.double()
    ordinary, padded = TrainingStep(copy.deepcopy(task), 0.1, 1.0), PaddedStep(task, 0.1, 1.0)
    expected = train(ordinary, graphs)
    torch.testing.assert_close(train(padded, graphs), expected, rtol=1e-6, atol=1e-8)
    assert 1 < len(padded.buckets) < len(BATCHES)


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_losses_of_fine_tuning_leave_filler_out(graphs, loss):
    pytest.importorskip("pydantic")
    from mgt_fast.target_scaling import TargetScaling
    from mgt_fast.train.config import FinetuneConfig
    from mgt_fast.train.feed import GraphSource
    from mgt_fast.train.finetune import FinetuneTask
    from mgt_fast.train.plan import BatchPlan

    task = FinetuneTask(
        make_task().model.double(),
        GraphSource(CrystalDataset.open(None), 6, None, torch.device("cpu")),
        BatchPlan(np.arange(8), np.full(8, 50), 3, smallest=2),
        np.linspace(-1, 2, 8),
        {"train": np.arange(8)},
        TargetScaling(0.5, 2.0),
        FinetuneConfig(loss=loss),
    )
    indices = np.array(BATCHES[0])
    expected = TrainingStep(task).gradients(one_chunk(indices, graphs[0]))
    expected_gradient = [p.grad for p in task.model.parameters()]
    found = PaddedStep(task).gradients(one_chunk(indices, graphs[0]))
    torch.testing.assert_close(
        [found.loss, found.figures["mae"]], [expected.loss, expected.figures["mae"]], rtol=1e-6, atol=0
    )
    gradient = [p.grad for p in task.model.parameters()]
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)


def test_buckets_used_last_are_kept(graphs, monkeypatch):
    monkeypatch.setattr(capture, "MAX_BUCKETS", 1)
    step = PaddedStep(make_task())
    train(step, graphs[:3])
    assert len(step.buckets) == 1
    arrays = next(iter(step.buckets.values())).graph.edge_vec
    train(step, graphs[2:3], BATCHES[2:])
    assert next(iter(step.buckets.values())).graph.edge_vec is arrays


def test_crystals_without_statistics_are_named(graphs):
    graph = graphs[0]
    few = replace(
        graph,
        edge_index=graph.edge_index[:, :1],
        edge_vec=graph.edge_vec[:1],
        cell_shift=graph.cell_shift[:1],
        row_ptr=graph.row_ptr.clamp(max=1),
    )
    with pytest.raises(ValueError, match=f"and 1 edges: batch statistics need at least 2 .*: {graph.ids[0]}"):
        PaddedStep(make_task()).gradients(one_chunk(BATCHES[0], few))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_nothing_is_captured_on_a_cpu(backend):
    with pytest.raises(ValueError, match=r"need a CUDA device and the Triton .* cpu with .*torch"):
        CapturedStep(make_task(backend=backend))


def test_asking_for_capture_on_a_cpu_is_an_error_of_the_run(tmp_path):
    pytest.importorskip("pydantic")
    from rich.console import Console

    from mgt_fast.train.config import ConfigError, FinetuneConfig
    from mgt_fast.train.finetune import finetune

    config = FinetuneConfig(capture=True, device="cpu", model=SMALL, data={"limit": 4})
    with pytest.raises(ConfigError, match="capture = true: CUDA graphs need a CUDA device"):
        finetune(config, tmp_path / "run", Console(quiet=True))
    assert not (tmp_path / "run").exists()


@needs_cuda
def test_captured_steps_train_as_ordinary_ones(graphs):
    task = make_task("cuda", "triton")
    ordinary, captured = TrainingStep(copy.deepcopy(task), 0.1, 1.0), CapturedStep(task, 0.1, 1.0)
    (expected, _), (found, _) = train(ordinary, graphs), train(captured, graphs)
    # Weights are compared by what they give: some have a gradient of rounding alone, which AdamW scales up.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    modules = zip(ordinary.task.model.modules(), captured.task.model.modules(), strict=True)
    for one, other in modules:
        if isinstance(one, torch.nn.BatchNorm1d):
            assert one.num_batches_tracked == other.num_batches_tracked == len(BATCHES)
            torch.testing.assert_close(other.running_var, one.running_var, rtol=0.02, atol=1e-4)
    assert abs(expected[3, 0] - expected[0, 0]) > 1e-2 * expected[0, 0]  # the same batch after three updates
    assert sum(bucket.gradients is not None for bucket in captured.buckets.values()) > 1


@needs_cuda
def test_dropout_differs_between_replays(graphs):
    step = CapturedStep(make_task("cuda", "triton", dropout=0.5), weight_decay=0.0)
    losses = []
    for i in range(6):
        losses.append(step.gradients(one_chunk(BATCHES[0], graphs[0], i)).loss.item())
        step.update(0.0)
    assert len(set(losses[2:])) > 1


@needs_cuda
def test_a_loss_that_is_not_finite_spares_the_weights(graphs):
    step = CapturedStep(make_task("cuda", "triton"))
    train(step, [graphs[0]] * 2, [BATCHES[0]] * 2)
    before = copy.deepcopy(list(step.task.model.parameters()))
    step.task.broken = True
    assert not step.gradients(one_chunk(BATCHES[0], graphs[0])).loss.isfinite()
    for parameter, kept in zip(step.task.model.parameters(), before, strict=True):
        assert torch.equal(parameter, kept)
