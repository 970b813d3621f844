import pytest
import torch

from mgt_fast.kernels import activations as op
from mgt_fast.kernels.activations import softplus
from mgt_fast.kernels.launch import watch_launches

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def values(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (5 * torch.randn(*shape, generator=generator)).to(DEVICE, dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(0, 4), (1,), (15, 3), (300, 16)])
def test_softplus_equals_reference(shape):
    x = values(*shape)
    with watch_launches() as launches:
        y = softplus(x, backend="triton")
        (grad,) = torch.autograd.grad(y.sin().sum(), x)
    assert [launch.name for launch in launches] == ["_softplus_kernel", "_softplus_backward_kernel"]
    expected = softplus(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=3e-9)  # torch's is linear above 20
    torch.testing.assert_close(grad, *torch.autograd.grad(expected.sin().sum(), x), rtol=1e-12, atol=3e-9)


def test_softplus_of_large_numbers():
    x = torch.tensor([-800.0, -40, 0, 40, 800], device=DEVICE, requires_grad=True)
    y = softplus(x, backend="triton")
    torch.testing.assert_close(y, torch.nn.functional.softplus(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.sigmoid(x))


def test_softplus_gradcheck():
    x = values(4, 3).t()  # not contiguous
    assert torch.autograd.gradcheck(lambda x: softplus(x, backend="triton"), x)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(DEVICE == "cpu", reason="wrong in Triton's interpreter: needs a GPU"),
        ),
    ],
)
def test_softplus_is_no_less_accurate_than_torch(dtype):
    x = values(3000, dtype=dtype)
    exact = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(softplus(exact).sum(), exact)
    got, torch_got = (softplus(x, backend=backend) for backend in ("triton", "torch"))
    assert got.dtype == dtype
    assert (got - softplus(exact)).norm() <= 2 * (torch_got - softplus(exact)).norm()
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in (got, torch_got)]
    # The slope, 1 − exp(−y), has the rounding of 1, also where it is small; torch's expm1 has not.
    rounding = torch.finfo(dtype).eps * len(x) ** 0.5 / 2
    assert (grads[0] - truth).norm() <= 2 * (grads[1] - truth).norm() + rounding


def test_softplus_opcheck():
    x = values(15, 3)
    torch.library.opcheck(op._softplus, (x,))
    torch.library.opcheck(op._softplus_backward, (x.detach(), x.detach()))
