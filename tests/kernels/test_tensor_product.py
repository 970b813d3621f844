import pytest
import torch
from e3nn import o3

from mgt_fast.kernels.segments import Segments
from mgt_fast.kernels.tensor_product import (
    TensorProductShape,
    spherical_harmonics,
    tensor_product_1,
    tensor_product_2,
)

NS, NV, K = 6, 3, 7
SHAPE = TensorProductShape(NS, NV)
FULL, SH, SCALARS = f"{NS}x0e+{NV}x1o+{NV}x2e", "1x0e+1x1o+1x2e", f"{NS}x0e"


def problem(num_atoms, num_edges):
    torch.manual_seed(num_edges)
    torch.set_default_dtype(torch.float64)
    edge_index = torch.randint(num_atoms, (2, num_edges))
    receiver, sender = (Segments(row, num_atoms) for row in edge_index)
    vec = torch.randn(num_edges, 3)
    hidden = torch.randn(num_edges, K, requires_grad=True)
    weight = torch.randn(SHAPE.weight_rows, K, requires_grad=True)
    bias = torch.randn(SHAPE.weight_rows, requires_grad=True)
    return edge_index, receiver, sender, vec, hidden, weight, bias


@pytest.fixture(autouse=True)
def _default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def e3nn_mean(irreps_in, irreps_out, node, edge_index, vec, hidden, weight, bias):
    product = o3.FullyConnectedTensorProduct(irreps_in, SH, irreps_out, shared_weights=False)
    harmonics = o3.spherical_harmonics(SH, vec, normalize=True, normalization="component")
    messages = product(node[edge_index[1]], harmonics, hidden @ weight.t() + bias)
    total = torch.zeros(node.shape[0], messages.shape[1]).index_add(0, edge_index[0], messages)
    return total / torch.bincount(edge_index[0], minlength=node.shape[0]).clamp(min=1)[:, None]


def compare(ours, reference, inputs):
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-10)
    weights = torch.linspace(-1, 1, ours.numel()).view_as(ours)
    grads = [torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, reference)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


SIZES = [(3, 0), (1, 1), (4, 15), (9, 63), (30, 20)]  # some leave atoms without edges


@pytest.mark.parametrize(("num_atoms", "num_edges"), SIZES)
def test_first_product_equals_e3nn(num_atoms, num_edges):
    edge_index, receiver, sender, vec, hidden, weight, bias = problem(num_atoms, num_edges)
    node = torch.randn(num_atoms, NS, requires_grad=True)
    parts = tensor_product_1(node, hidden, vec, weight, bias, SHAPE, receiver, sender)
    reference = e3nn_mean(SCALARS, FULL, node, edge_index, vec, hidden, weight, bias)
    compare(torch.cat([p.flatten(1) for p in parts], 1), reference, (node, hidden, weight, bias))


@pytest.mark.parametrize(("num_atoms", "num_edges"), SIZES)
def test_second_product_equals_e3nn(num_atoms, num_edges):
    edge_index, receiver, sender, vec, hidden, weight, bias = problem(num_atoms, num_edges)
    node = torch.randn(num_atoms, NS + 8 * NV, requires_grad=True)
    scalars, first, second = node.split((NS, 3 * NV, 5 * NV), 1)
    parts = scalars, first.unflatten(1, (NV, 3)), second.unflatten(1, (NV, 5))
    ours = tensor_product_2(parts, hidden, vec, weight, bias, SHAPE, receiver, sender)
    reference = e3nn_mean(FULL, SCALARS, node, edge_index, vec, hidden, weight, bias)
    compare(ours, reference, (node, hidden, weight, bias))


def test_float32_error_is_at_most_twice_e3nn():
    edge_index, receiver, sender, vec, hidden, weight, bias = problem(20, 500)
    node = torch.randn(20, NS)
    exact = e3nn_mean(SCALARS, FULL, node, edge_index, vec, hidden, weight, bias)
    torch.set_default_dtype(torch.float32)
    node, vec, hidden, weight, bias = (t.detach().float() for t in (node, vec, hidden, weight, bias))
    parts = tensor_product_1(node, hidden, vec, weight, bias, SHAPE, receiver, sender)
    ours = torch.cat([p.flatten(1) for p in parts], 1)
    plain = e3nn_mean(SCALARS, FULL, node, edge_index, vec, hidden, weight, bias)
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()


def test_harmonics_equal_e3nn():
    unit = torch.nn.functional.normalize(torch.randn(50, 3, dtype=torch.float64), dim=1)
    ours = torch.cat(spherical_harmonics(unit), 1)
    reference = o3.spherical_harmonics("1o+2e", unit, normalize=True, normalization="component")
    torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
