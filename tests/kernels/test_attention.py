"""The two attention operations against the layers as the paper writes them: concatenate, then MLP."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mgt_fast.kernels.batch_norm import BatchNorm
from mgt_fast.kernels.edge_attention import edge_attention
from mgt_fast.kernels.node_attention import node_attention
from mgt_fast.kernels.segments import Segments

C = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def gate(query, key, value, norm):
    product = (query * key / C**0.5).flatten(0, -2)
    return value * torch.sigmoid(norm(product).view_as(value))


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


class Problem:
    """Random weights and a random ragged graph; `grads` differentiates by everything."""

    def __init__(self, num_rows, num_groups):
        torch.manual_seed(num_rows)
        torch.set_default_dtype(torch.float64)
        self.key, self.value = nn.Linear(C, C), nn.Linear(C, C)
        self.norm = BatchNorm(C)
        nn.init.normal_(self.norm.weight)
        self.rows = [Segments(torch.randint(num_groups, (num_rows,)), num_groups) for _ in range(2)]
        self.inputs = []
        torch.set_default_dtype(torch.float32)

    def tensor(self, *shape):
        self.inputs.append(torch.randn(*shape, dtype=torch.float64, requires_grad=True))
        return self.inputs[-1]

    def grads(self, out):
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        modules = (self.key, self.value, self.norm)
        inputs = [*self.inputs, *(p for module in modules for p in module.parameters())]
        return torch.autograd.grad((out * weights).sum(), inputs)


def compare(problem, ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(problem.grads(ours), problem.grads(expected), rtol=1e-9, atol=1e-10)


@on_both_backends
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("num_edges", "num_crystals"), [(1, 1), (15, 2), (63, 5)])
def test_edge_attention(num_edges, num_crystals, training, backend):
    p = Problem(num_edges, num_crystals)
    p.norm.train(training)
    edge, angle = p.tensor(num_edges, C), p.tensor(num_edges, 3, C)
    frame, edge_b = p.tensor(num_crystals, 3, 2 * C), p.tensor(3 * C)
    edge_w, angle_w = p.tensor(3 * C, C), p.tensor(2 * C, C)
    crystal = p.rows[0]
    weights = edge_w, edge_b, angle_w, p.key, p.value, p.norm
    ours = edge_attention(edge, angle, frame, crystal, *weights, backend=backend)

    merged = torch.cat((edge_w[C:], angle_w), dim=1)  # [2C, C + C]
    both = torch.cat((edge[:, None].expand(-1, 3, -1), angle), dim=2)
    hidden = F.silu(both @ merged.t() + edge_b[C:] + frame[crystal.index])
    key, value = p.key(hidden[..., :C]), p.value(hidden[..., C:])
    query = (edge @ edge_w[:C].t() + edge_b[:C])[:, None]
    compare(p, ours, gate(query, key, value, p.norm).sum(1))


@on_both_backends
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("num_edges", "num_atoms"), [(2, 1), (15, 4), (63, 9), (5, 30)])
def test_node_attention(num_edges, num_atoms, training, backend):
    p = Problem(num_edges, num_atoms)
    p.norm.train(training)
    node, edge = p.tensor(num_atoms, C), p.tensor(num_edges, C)
    target_w, target_b = p.tensor(3 * C, C), p.tensor(3 * C)
    source_w, edge_w = p.tensor(2 * C, C), p.tensor(2 * C, C)
    source, target = p.rows
    weights = target_w, target_b, source_w, edge_w, p.key, p.value, p.norm
    ours = node_attention(node, edge, source, target, *weights, backend=backend)

    x_i, x_j = node[target.index], node[source.index]
    merged = torch.cat((target_w[C:], source_w, edge_w), 1)
    hidden = F.silu(torch.cat((x_i, x_j, edge), 1) @ merged.t() + target_b[C:])
    query = x_i @ target_w[:C].t() + target_b[:C]
    messages = gate(query, p.key(hidden[:, :C]), p.value(hidden[:, C:]), p.norm)
    compare(p, ours, torch.zeros(num_atoms, C, dtype=torch.float64).index_add(0, target.index, messages))


@on_both_backends
def test_atoms_without_edges_receive_nothing(backend):
    p = Problem(0, 3)
    p.norm.eval()
    node, edge = p.tensor(3, C), p.tensor(0, C)
    weights = p.tensor(3 * C, C), p.tensor(3 * C), p.tensor(2 * C, C), p.tensor(2 * C, C)
    out = node_attention(node, edge, *p.rows, *weights, p.key, p.value, p.norm, backend=backend)
    assert not out.any()
    assert out.shape == (3, C)
    assert all(not grad.any() for grad in p.grads(out))
