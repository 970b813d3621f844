"""A batch that exceeds the memory budget is divided, and gives what it gives undivided.

All in float64, where a difference is an error and not rounding.
"""

from itertools import product

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small_runs import KINDS, double_precision, overrides

from mgt_fast.data.counts import edge_counts
from mgt_fast.distributed import Ranks
from mgt_fast.losses import nt_xent
from mgt_fast.train import setup
from mgt_fast.train.config import load_config
from mgt_fast.train.finetune import finetuning_task
from mgt_fast.train.plan import MemoryBudgetError
from mgt_fast.train.pretrain import pretraining_task
from mgt_fast.train.step import TrainingStep

LARGEST = 192  # edges of a crystal, with this seed
CPU = torch.device("cpu")
NETWORKS = {
    "crystal": ("pretrain",),
    "edge": ("pretrain", "model.denoising=edge"),
    "se3": ("pretrain", "model.views=se3"),
    "so3": ("pretrain", "model.views=so3"),
    "finetune": ("finetune",),
}
WAYS = ("whole", "recomputed", "chunks")


class OneOf(Ranks):
    """One of many ranks whose others are not there."""

    def __init__(self, rank, size):
        self.group, self.rank, self.size = None, rank, size

    def gather(self, value):
        return [value]

    def sum_(self, tensor):
        return tensor


def settings(network, statistics, *changes):
    command, *own = NETWORKS[network]
    values = overrides(
        command, "model.num_blocks=2", "optim.batch_size=12", "seed=12", f"optim.statistics={statistics}"
    )
    return command, load_config(KINDS[command], None, [*values, *own, *changes])


def task_of(command, config, ranks):
    make = {"pretrain": pretraining_task, "finetune": finetuning_task}[command]
    torch.manual_seed(3)
    return make(config, CPU, ranks)[0]


def made(network, way, statistics="global", ranks=None):
    """Return a task and its first batch, divided in a way by a memory budget that asks for it."""
    ranks = ranks or Ranks.alone()
    command, config = settings(network, statistics)
    plan = task_of(command, config, ranks).feed.plan
    split = plan.batch(1, 0)
    share = max(split.edges[chunk].sum() for (chunk,) in split.shares)
    whole, recomputed = plan.budget.bytes_per_edge, plan.budget.recomputed_bytes_per_edge
    limit = {
        "whole": share * whole * 1.01,
        "recomputed": share * (recomputed + whole) / 2,
        "chunks": LARGEST * whole * 1.01,
    }[way]
    command, config = settings(network, statistics, f"memory_gib={limit / 2**30}")
    task = task_of(command, config, ranks)
    batch = next(task.batches(1))
    assert batch.recompute == (way == "recomputed")
    assert batch.chunked == (way == "chunks")
    assert way != "chunks" or ranks.size > 1 or len(batch.chunks) > 2
    return task, batch


def found_by(task, result):
    """Loss and figures, gradients, running statistics."""
    found = {"loss": result.loss, "norm": result.norm, **result.figures}
    found |= {f"gradient of {name}": value.grad for name, value in task.model.named_parameters()}
    found |= {name: value for name, value in task.model.named_buffers() if "running" in name}
    return {
        name: value.detach().double().numpy().copy() for name, value in found.items() if value is not None
    }


def gradients(network, way, statistics="global", ranks=None):
    """Return what a step finds, as arrays."""
    ranks = ranks or Ranks.alone()
    with double_precision():
        task, batch = made(network, way, statistics, ranks)
        task.model.train()
        step = TrainingStep(task, grad_clip=1.0, ranks=ranks, statistics=statistics)
        return found_by(task, step.gradients(batch))


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_divided_batch_gives_what_the_whole_gives(network, way):
    """Loss, figures, gradients, running statistics, with dropout; to 1e-9."""
    expected = gradients(network, "whole")
    assert expected["norm"] > 0
    assert sum(np.abs(value).max() > 0 for name, value in expected.items() if "gradient" in name) > 20
    same(gradients(network, way), expected)


def on_rank(rank, cases):
    return [gradients(network, way, statistics, Ranks()) for network, way, statistics in cases]


def test_ranks_take_the_same_path_and_find_the_same(tmp_path):
    """Two ranks, whose shares are whole, recomputed or in chunks, against one rank with the whole batch."""
    cases = [(network, way, "global") for network, way in product(("crystal", "edge", "finetune"), WAYS)]
    expected = {network: gradients(network, "whole") for network, _, _ in cases}
    for results in run_ranks(on_rank, 2, tmp_path, cases):
        for (network, _, _), found in zip(cases, results, strict=True):
            same(found, expected[network])


def separately(shares):
    """Return what a batch gives whose chunks have statistics of their own: one sum, one backward pass.

    Args:
        shares: tasks and batches of ranks that start alike.
    """
    first = shares[0][0]
    before = {name: value.clone() for name, value in first.model.named_buffers()}
    running, losses, embeddings, places = [], [], [], []
    for _, share in shares:
        for name, value in before.items():
            owner, _, buffer = name.rpartition(".")
            setattr(first.model.get_submodule(owner), buffer, value.clone())
        for chunk in share.chunks:
            one = first.forward(share, chunk)
            losses.append(one.loss)
            if one.embeddings is not None:
                embeddings.append(one.embeddings)
                places.append(chunk.places)
        running.append({name: value.clone() for name, value in first.model.named_buffers()})
    loss = sum(losses)
    if embeddings:
        z = torch.cat(embeddings, 1)[:, torch.cat(places).argsort()]
        loss = loss + nt_xent(*z)
    loss.backward()
    parameters = dict(first.model.named_parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    expected = {"loss": loss, "norm": norm}
    expected |= {f"gradient of {name}": p.grad for name, p in parameters.items() if p.grad is not None}
    for name in running[0]:
        if "running" in name:
            expected[name] = sum(values[name] for values in running) / len(running)
    return {name: value.detach().numpy() for name, value in expected.items()}


def local_shares(network, way, size):
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        # Nobody is there to count the others' crystals.
        patch.setattr(setup, "edge_counts", lambda *kind, ranks, **options: edge_counts(*kind, **options))
        for rank in range(size):
            task, batch = made(network, way, "local", OneOf(rank, size))
            task.model.train()
            shares.append((task, batch))
    return shares


LOCAL = [(network, way, "local") for network, way in product(("crystal", "edge", "finetune"), WAYS)]


@pytest.mark.parametrize(("network", "way"), [case[:2] for case in LOCAL])
def test_local_statistics_are_those_of_each_chunk(network, way):
    with double_precision():
        expected = separately(local_shares(network, way, 1))
    found = gradients(network, way, "local")
    same({name: found[name] for name in expected}, expected)


def test_local_statistics_on_ranks(tmp_path):
    """Each rank's chunks by themselves, the contrast over all; running statistics are the ranks' average."""
    with double_precision():
        expected = [separately(local_shares(network, way, 2)) for network, way, _ in LOCAL]
    first, second = run_ranks(on_rank, 2, tmp_path, LOCAL)
    for one, other, wanted in zip(first, second, expected, strict=True):
        same({name: one[name] for name in wanted}, wanted)
        for name in one:
            assert np.array_equal(one[name], other[name]), name


@pytest.mark.parametrize("network", ["crystal", "finetune"])
def test_a_crystal_over_the_budget_is_named_before_training(network):
    command, config = settings(network, "global")
    plan = task_of(command, config, Ranks.alone()).feed.plan
    largest = int(plan.edges.argmax())
    need = plan.edges[largest] * plan.budget.recomputed_bytes_per_edge
    command, config = settings(network, "global", f"memory_gib={0.9 * need / 2**30}")
    with pytest.raises(MemoryBudgetError, match=r"crystal 'mp-\d+' has \d+ edges.*set a larger memory_gib"):
        task_of(command, config, Ranks.alone())
