import copy

import pytest
import torch

from mgt_fast.kernels import residual_norm as op
from mgt_fast.kernels.batch_norm import BatchNorm
from mgt_fast.kernels.launch import watch_launches
from mgt_fast.kernels.residual_norm import residual_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU_ONLY = pytest.mark.skipif(DEVICE == "cpu", reason="wrong in Triton's interpreter: needs a GPU")


def problem(num_rows, channels, dtype=torch.float64, training=True, offset=0.0):
    generator = torch.Generator().manual_seed(num_rows)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [(draw(num_rows, channels) + shift).to(DEVICE, dtype).requires_grad_() for shift in (0, offset)]
    norm = BatchNorm(channels, dtype=torch.float64)
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(draw(channels))
        norm.running_var.copy_(draw(channels).square() + 0.1)
    wide = torch.promote_types(dtype, torch.float32)
    return inputs, norm.to(DEVICE, wide).train(training)


def run(inputs, norm, backend, count=None):
    """Output, gradients of inputs and parameters, buffers afterwards."""
    norm = copy.deepcopy(norm)
    out = residual_norm(*inputs, norm, count=count, backend=backend)[:count]
    weight = torch.linspace(-1, 2, out.numel(), dtype=torch.float64, device=DEVICE).view_as(out)
    grads = torch.autograd.grad((out * weight).sum(), [*inputs, norm.weight, norm.bias])
    return [out, *grads, *norm.buffers()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("num_rows", "channels"), [(2, 16), (15, 32), (63, 5), (300, 130), (2000, 1)])
def test_equals_reference(num_rows, channels, training):
    pytest.importorskip("triton")
    inputs, norm = problem(num_rows, channels, training=training)
    with watch_launches() as launches:
        got = run(inputs, norm, "triton")
    statistics = ["_partial_statistics_kernel", "_merge_statistics_kernel"]
    assert [launch.name for launch in launches] == [
        *(statistics if training else []),
        "_forward_kernel",
        "_backward_sums_kernel",
        "_backward_y_kernel",
    ]
    for a, b in zip(got, run(inputs, norm, "torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_rows", [2, 63, 150])
def test_rows_that_do_not_count_change_nothing(num_rows, training, backend):
    pytest.importorskip("triton")
    inputs, norm = problem(num_rows, 5, training=training)
    expected = run(inputs, norm, backend)
    padded = [torch.cat((v.detach(), 3 * v.detach().repeat(70, 1)[:130])).requires_grad_() for v in inputs]
    got = run(padded, norm, backend, torch.tensor(num_rows, device=DEVICE))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a[: len(b)] if b.dim() else a, b, rtol=1e-10, atol=1e-10)
    for grad in got[1:3]:
        assert not grad[num_rows:].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_few_rows(backend):
    pytest.importorskip("triton")
    inputs, norm = problem(0, 16, training=False)
    assert run(inputs, norm, backend)[0].shape == (0, 16)
    inputs, norm = problem(1, 16, training=False)
    assert run(inputs, norm, backend)[0].isfinite().all()
    with pytest.raises(ValueError, match=r"batch statistics need at least 2 rows, got 1|more than 1 value"):
        residual_norm(*inputs, norm.train(), backend=backend)


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training):
    pytest.importorskip("triton")
    inputs, norm = problem(5, 3, training=training)

    def function(x, y, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        with torch.no_grad():
            kept = copy.deepcopy(norm)
        for name, value in parameters.items():
            delattr(kept, name)
            setattr(kept, name, value)
        return residual_norm(x, y, kept, backend="triton")

    weight, bias = (p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias))
    assert torch.autograd.gradcheck(function, (*inputs, weight, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=GPU_ONLY)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_no_less_accurate_than_torch(dtype, offset):
    pytest.importorskip("triton")
    inputs, norm = problem(300, 16, dtype, offset=offset)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = run(exact_inputs, copy.deepcopy(norm).double(), "torch")
    got, torch_got = (run(inputs, norm, backend) for backend in ("triton", "torch"))
    for a, b, truth in zip(got, torch_got, exact, strict=True):
        assert a.dtype == b.dtype
        assert (a - truth).double().norm() <= 2 * (b - truth).double().norm()


@GPU_ONLY
def test_autocast():
    inputs, norm = problem(300, 16, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = residual_norm(*inputs, norm, backend="triton")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), residual_norm(*inputs, norm), rtol=2**-6, atol=2**-6)


def test_two_runs_are_bitwise_equal():
    pytest.importorskip("triton")
    inputs, norm = problem(300, 16, torch.float32)
    runs = [run(inputs, norm, "triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_statistics_merge_in_any_grouping():
    """Two processes' rows, merged, have the statistics of all rows."""
    pytest.importorskip("triton")
    (_, y), _ = problem(300, 16, offset=10.0)
    shares = [op._merge_statistics(op._partial_statistics(part)) for part in y.detach().split((47, 253))]
    count, mean, var = op._merge_statistics(torch.stack(shares))
    assert (count == 300).all()
    torch.testing.assert_close(mean, y.detach().mean(0))
    torch.testing.assert_close(var, y.detach().var(0, unbiased=False))


@pytest.mark.parametrize(("training", "count"), [(True, None), (True, 9), (False, None)])
def test_opcheck(training, count):
    pytest.importorskip("triton")
    (x, y), norm = problem(15, 4, training=training)
    count = None if count is None else torch.tensor(count, device=DEVICE)
    parts = op._partial_statistics(y.detach(), count)
    torch.library.opcheck(op._partial_statistics, (y.detach(), count))
    torch.library.opcheck(op._merge_statistics, (parts,))
    _, mean, var = op._merge_statistics(parts)
    out = residual_norm(x, y, norm, backend="triton").detach()
    x, y, weight, bias = (tensor.detach() for tensor in (x, y, norm.weight, norm.bias))
    torch.library.opcheck(op._forward, (x, y, mean, var, weight, bias, norm.eps))
    torch.library.opcheck(op._backward_sums, (x, out, y, mean, var, norm.eps))
    averages = torch.ones(2, 4, dtype=torch.float64, device=DEVICE) if training else None
    torch.library.opcheck(op._backward_y, (x, y, mean, var, norm.weight.detach(), averages, norm.eps, count))
