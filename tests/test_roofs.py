"""What operations must do at least, counted and under roofs."""

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mgt_fast import MGT, MGTConfig, build_graph
from mgt_fast.data import CrystalDataset
from mgt_fast.kernels.launch import watch_launches
from mgt_fast.roofs import Cost, OperationCounter, measure_ceilings

CEILINGS = {"copy": 1e9, "float32": 1e10, "bf16": 1e11}


def counted(run):
    with OperationCounter(CEILINGS) as counter:
        run()
    return counter.tallies


def test_product():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    tally = counted(lambda: (a @ b, a @ b))["aten::mm"]
    assert (tally.calls, tally.flops, tally.bytes) == (2, 2 * 2 * 3 * 5 * 7, 2 * 4 * (15 + 35 + 21))
    assert tally.floor == pytest.approx(max(tally.flops / 1e10, tally.bytes / 1e9))


def test_every_call_has_its_own_roof():
    wide, thin = torch.ones(400, 400), torch.ones(1, 400)

    def run():
        wide @ wide
        thin @ wide

    tally = counted(run)["aten::mm"]
    by_products, by_memory = 2 * 400**3 / 1e10, 4 * (400**2 + 2 * 400) / 1e9
    assert tally.floor == pytest.approx(by_products + by_memory)


def test_bfloat16_has_its_roof():
    a = torch.ones(400, 400, dtype=torch.bfloat16)
    assert counted(lambda: a @ a)["aten::mm"].floor == pytest.approx(2 * 400**3 / 1e11)


def test_backward_pass_has_two_products():
    a, b = (torch.ones(8, 8, requires_grad=True) for _ in "ab")
    assert counted(lambda: (a @ b).sum().backward())["aten::mm"].flops == 3 * 2 * 8**3


X, INDEX = torch.ones(100, 10), torch.tensor([3, 4])


@pytest.mark.parametrize(
    ("run", "name", "num_bytes"),
    [
        (lambda: X + 1, "aten::add", 8000),
        (lambda: X.clone().add_(X), "aten::add", 12000),  # in place or not
        (lambda: torch.empty(100, 10).copy_(X), "aten::copy", 8000),
        (lambda: torch.empty(100, 10).zero_(), "aten::zero", 4000),
        (lambda: X.index_select(0, INDEX), "aten::index_select", 2 * 80 + 16),
        (lambda: X[INDEX], "aten::index", 2 * 80 + 16),
        (lambda: X.clone().index_put_((INDEX,), X[:2]), "aten::index_put", 3 * 80 + 2 * 16),
        (lambda: torch.ones(1, 10).expand(100, 10) + 1, "aten::add", 40 + 4000),
        (lambda: torch.cat([X, X]), "aten::cat", 16000),
    ],
)
def test_bytes(run, name, num_bytes):
    assert counted(run)[name].bytes == pytest.approx(num_bytes, abs=40)


def test_views_do_nothing():
    def run():
        torch.empty(3, 4).view(4, 3).t().reshape(3, 4).detach().unsqueeze(0).expand(2, 3, 4)
        F.linear(torch.empty(2, 3, 4), torch.empty(5, 4))

    assert set(counted(run)) <= {"aten::mm", "aten::addmm", "aten::bmm"}


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench")
    return importlib.import_module("costs")


def test_kernels_do_what_the_algebra_asks(costs):
    """The formulas of our operations are those of `bench/costs.py`, without the products made outside."""
    graph = build_graph(CrystalDataset.open(None).gather(range(4)))
    config = MGTConfig(task="pretrain", channels=32, num_scalars=16, num_vectors=4, dropout=0.0)
    with watch_launches(run=False), OperationCounter(CEILINGS) as counter:
        MGT(config, backend="triton")(graph).se3_proj.sum().backward()
    sizes = costs.Sizes(graph.num_atoms, graph.num_edges, graph.num_crystals, 32, 16, 4)
    num_edges, num_atoms = graph.num_edges, graph.num_atoms
    flops = {name: tally.flops for name, tally in counter.tallies.items()}
    edge_wise = costs.edge_attention(sizes).flops - 2 * 3 * 32**2 * num_edges
    node_wise = costs.node_attention(sizes).flops - 2 * 5 * 32**2 * num_atoms

    def total(*halves):
        return sum(flops[f"mgt_fast::gated_attention_{half}"] for half in halves)

    assert total("keys", "values") == 2 * edge_wise + 4 * node_wise
    assert total("backward_keys", "backward_values") == 2 * (2 * edge_wise + 2 * node_wise)
    products = costs.tensor_product_1(sizes).flops + costs.tensor_product_2(sizes).flops
    assert flops["mgt_fast::tensor_product"] == 2 * products
    embedded = costs.rbf_embedding(sizes, 5 * num_edges + 3 * graph.num_crystals).flops
    assert flops["mgt_fast::rbf_embedding"] == embedded


def test_ceilings_of_this_machine():
    found = measure_ceilings(torch.device("cpu"), 64, 2**16, ["float32", "bf16"])
    assert set(found) == {"copy", "float32", "bf16"}
    assert all(value > 0 for value in found.values())


def test_cost_names_the_nearer_roof():
    cost = Cost(flops=100.0, bytes=10.0)
    assert cost.roof(flop_rate=10.0, bandwidth=2.0) == "products"
    assert cost.floor(flop_rate=10.0, bandwidth=2.0) == 10.0
    assert cost.roof(flop_rate=100.0, bandwidth=2.0) == "memory"
