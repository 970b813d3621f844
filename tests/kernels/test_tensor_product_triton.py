from contextlib import nullcontext

import pytest
import torch
from torch.library import opcheck

from mgt_fast.kernels.launch import watch_launches
from mgt_fast.kernels.segments import Segments
from mgt_fast.kernels.tensor_product import (
    TensorProductShape,
    _tensor_product,
    _tensor_product_backward,
    tensor_product_1,
    tensor_product_2,
)

triton = pytest.importorskip("triton")
from mgt_fast.kernels.tensor_product import triton as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has neither TF32 nor bfloat16")
SHAPE, K = TensorProductShape(6, 3), 32
SIZES = [(3, 0), (1, 1), (4, 15), (3, 63), (9, 6), (2, 300)]  # some leave atoms without edges


def segments(num_atoms, num_edges):
    """Receivers sorted with their CSR pointer, as a graph gives them; senders in any order."""
    receiver, sender = torch.randint(num_atoms, (2, num_edges), device=DEVICE)
    receiver = receiver.sort().values
    ptr = torch.zeros(num_atoms + 1, dtype=torch.int64, device=DEVICE)
    ptr[1:] = torch.bincount(receiver, minlength=num_atoms).cumsum(0)
    return Segments(receiver, num_atoms, ptr), Segments(sender, num_atoms)


def problem(product, num_atoms, num_edges, dtype=torch.float64, shape=SHAPE, channels=K):
    """Inputs (the atoms' features in front), segments, and the function of the inputs and a backend."""
    torch.manual_seed(num_edges)
    ns, nv = shape.num_scalars, shape.num_vectors
    rows = segments(num_atoms, num_edges)
    node = [(num_atoms, ns), (num_atoms, nv, 3), (num_atoms, nv, 5)][: 1 if product == 1 else 3]
    sizes = (
        *node,
        (num_edges, channels),
        (num_edges, 3),
        (shape.weight_rows, channels),
        (shape.weight_rows,),
    )
    inputs = [torch.randn(size, dtype=dtype, device=DEVICE, requires_grad=True) for size in sizes]

    def run(*inputs, backend="triton"):
        *node, hidden, edge_vec, weight, bias = inputs
        others = (hidden, edge_vec, weight, bias, shape, *rows)
        if product == 2:
            return tensor_product_2(tuple(node), *others, backend=backend)
        return torch.cat([part.flatten(1) for part in tensor_product_1(*node, *others, backend=backend)], 1)

    return inputs, rows, run


def with_gradients(run, inputs, **options):
    out = run(*inputs, **options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=DEVICE).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("product", [1, 2])
@pytest.mark.parametrize(("num_atoms", "num_edges"), SIZES)
def test_equals_reference(product, num_atoms, num_edges):
    inputs, _, run = problem(product, num_atoms, num_edges)
    results = (with_gradients(run, inputs, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("product", [1, 2])
@pytest.mark.parametrize(("ns", "nv", "channels"), [(5, 1, 64), (20, 9, 16)])
def test_other_sizes(product, ns, nv, channels):
    inputs, _, run = problem(product, 2, 40, shape=TensorProductShape(ns, nv), channels=channels)
    results = (with_gradients(run, inputs, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("product", [1, 2])
def test_atoms_in_rounds(product, monkeypatch):
    inputs, _, run = problem(product, 17, 20, channels=16)
    whole = with_gradients(run, inputs)
    monkeypatch.setattr(kernels, "SCRATCH_BYTES", 1)
    with watch_launches() as launches:
        rounds = with_gradients(run, inputs)
    assert sum(launch.name == "_outer_kernel" for launch in launches) == (6 if product == 1 else 4)
    torch.testing.assert_close(rounds, whole, rtol=1e-12, atol=1e-12)


PRECISIONS = {
    "float32": (torch.float32, "highest", nullcontext()),
    "tf32": (torch.float32, "high", nullcontext()),
    "bf16": (torch.float32, "highest", torch.autocast(DEVICE, torch.bfloat16)),
}


@pytest.mark.parametrize("product", [1, 2])
@pytest.mark.parametrize(
    "precision", ["float32", pytest.param("tf32", marks=needs_gpu), pytest.param("bf16", marks=needs_gpu)]
)
def test_error_is_at_most_twice_torch(product, precision):
    dtype, matmul, autocast = PRECISIONS[precision]
    inputs, _, run = problem(product, 3, 120)
    exact = with_gradients(run, inputs, backend="torch")
    low = [x.detach().to(dtype).requires_grad_() for x in inputs]
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        with autocast:
            ours, plain = (with_gradients(run, low, backend=backend) for backend in ("triton", "torch"))
    finally:
        torch.set_float32_matmul_precision(previous)
    for mine, theirs, value in zip(ours, plain, exact, strict=True):
        assert (mine.double() - value).norm() <= 2 * (theirs.double() - value).norm() + 1e-7 * value.norm()


@pytest.mark.parametrize("product", [1, 2])
def test_two_runs_are_equal(product):
    inputs, _, run = problem(product, 3, 70, torch.float32)
    first, second = (with_gradients(run, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("product", [1, 2])
def test_gradients_numerically(product):
    shape = TensorProductShape(2, 1)
    inputs, _, run = problem(product, 2, 5, shape=shape, channels=16)
    torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("product", [1, 2])
def test_kernels_run_and_skip_what_nobody_wants(product):
    inputs, _, run = problem(product, 4, 15, torch.float32)
    edge_vec = inputs[-3].requires_grad_(False)
    with watch_launches() as launches:
        out = run(*inputs)
    vectors = ["_apply_kernel", "_spread_kernel"] if product == 1 else []
    assert [launch.name for launch in launches] == ["_outer_kernel", *vectors]
    with watch_launches() as launches:
        out.sum().backward()
    assert "_turn_kernel" not in {launch.name for launch in launches}
    assert edge_vec.grad is None


def test_opcheck():
    receiver, sender = segments(2, 5)
    torch.manual_seed(0)
    S, V, width, vectors = 6, 3, 5, 2
    sizes = [(2, S + 8 * V), (5, 16), (5, 3), (17 * (S + 2 * V), width), (S, 17 * 2 * vectors)]
    inputs = [torch.randn(size, dtype=torch.float64, device=DEVICE, requires_grad=True) for size in sizes]
    rows = (receiver.order, receiver.ptr, receiver.index, sender.order, sender.ptr, sender.index)
    opcheck(_tensor_product, (*inputs, S, *rows))
    grad = torch.randn(2, width + 8 * vectors, dtype=torch.float64, device=DEVICE)
    detached = [x.detach() for x in inputs]
    for wants_edge_vec in (False, True):
        opcheck(_tensor_product_backward, (grad, *detached, S, *rows, wants_edge_vec))


def test_other_channel_counts_are_refused():
    inputs, _, run = problem(1, 4, 15, channels=24)
    with pytest.raises(ValueError, match=r"24 hidden channels.*backend='torch'"):
        run(*inputs)
