import pytest
import torch

from mgt_fast.kernels import rbf_embedding as op
from mgt_fast.kernels.launch import watch_launches
from mgt_fast.kernels.rbf_embedding import rbf_embedding

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU_ONLY = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the interpreter has no such arithmetic")
ACTIVATIONS = (None, "softplus", "silu")


def problem(num_rows, channels, num_centers, dtype=torch.float64, low=-1.0, high=1.0):
    generator = torch.Generator().manual_seed(num_rows)
    centers = torch.linspace(low, high, num_centers, dtype=dtype)
    # A quarter wider than the centres' range on both sides: noisy cosines leave [-1, 1].
    x = (torch.rand(num_rows, generator=generator, dtype=torch.float64) * 1.5 - 0.25) * (high - low) + low
    weight = torch.randn(channels, num_centers, generator=generator, dtype=torch.float64)
    bias = torch.randn(channels, generator=generator, dtype=torch.float64)
    inputs = [tensor.to(DEVICE, dtype).requires_grad_() for tensor in (x, weight, bias)]
    return inputs, centers.to(DEVICE), float(centers[1] - centers[0])


def with_gradients(inputs, centers, spacing, activation, backend, wanted=(0, 1, 2)):
    y = rbf_embedding(*inputs, centers, spacing, activation, backend=backend)
    weight = torch.linspace(-1, 2, y.numel(), dtype=torch.float64, device=DEVICE).view_as(y)
    return y, *torch.autograd.grad((y * weight).sum(), [inputs[i] for i in wanted])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", [16, 32])
@pytest.mark.parametrize("num_rows", [0, 1, 15, 63, 300])
def test_equals_reference(num_rows, channels, activation):
    inputs, centers, spacing = problem(num_rows, channels, channels)
    got = with_gradients(inputs, centers, spacing, activation, "triton")
    for a, b in zip(got, with_gradients(inputs, centers, spacing, activation, "torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("num_centers", [4, 13, 20, 130])
def test_any_number_of_centers(num_centers):
    inputs, centers, spacing = problem(15, 16, num_centers)
    got = with_gradients(inputs, centers, spacing, "silu", "triton")
    for a, b in zip(got, with_gradients(inputs, centers, spacing, "silu", "torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("activation", "wanted", "kernels"),
    [
        ("softplus", (1, 2), ["_embed_kernel", "_weight_gradient_kernel"]),
        ("softplus", (0,), ["_embed_kernel", "_row_gradient_kernel"]),
        ("silu", (1,), ["_embed_kernel", "_row_gradient_kernel", "_weight_gradient_kernel"]),
    ],
)
def test_only_what_is_wanted_is_computed(activation, wanted, kernels):
    inputs, centers, spacing = problem(15, 16, 16)
    for i in {0, 1, 2} - set(wanted):
        inputs[i].requires_grad_(False)
    with watch_launches() as launches:
        got = with_gradients(inputs, centers, spacing, activation, "triton", wanted)
    assert [launch.name for launch in launches] == kernels
    for a, b in zip(got, with_gradients(inputs, centers, spacing, activation, "torch", wanted), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_far_outside_only_the_bias_is_left():
    (_, weight, bias), centers, spacing = problem(1, 16, 64)
    far = torch.tensor([-1e6, 1e6, -float("inf")], dtype=torch.float64, device=DEVICE)
    y = rbf_embedding(far, weight, bias, centers, spacing, backend="triton")
    torch.testing.assert_close(y, bias.expand(3, -1))


def test_not_a_number_stays_one():
    (_, weight, bias), centers, spacing = problem(1, 16, 64)
    x = torch.tensor([0.3, float("nan")], dtype=torch.float64, device=DEVICE)
    y = rbf_embedding(x, weight, bias, centers, spacing, backend="triton")
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    inputs, centers, spacing = problem(5, 16, 6)
    assert torch.autograd.gradcheck(
        lambda *a: rbf_embedding(*a, centers, spacing, activation, backend="triton"), inputs, fast_mode=True
    )


@pytest.mark.parametrize("precision", ["highest", pytest.param("high", marks=GPU_ONLY)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_less_accurate_than_torch(activation, precision):
    torch.set_float32_matmul_precision(precision)
    inputs, centers, spacing = problem(300, 16, 64, torch.float32, -4.0, 4.0)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = with_gradients(exact_inputs, centers.double(), spacing, activation, "torch")
    pairs = (with_gradients(inputs, centers, spacing, activation, backend) for backend in ("triton", "torch"))
    for got, torch_got, truth in zip(*pairs, exact, strict=True):
        assert got.dtype == torch.float32
        # TF32 rounds the factors of the weight's gradient to 11 bits; torch's gather has no such product.
        allowed = 2 * (torch_got - truth).norm() + (precision == "high") * 2**-11 * truth.norm()
        assert (got - truth).norm() <= allowed
    torch.set_float32_matmul_precision("highest")


@GPU_ONLY
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("channels", [128, 256, 512])
def test_bfloat16(channels, activation):
    inputs, centers, spacing = problem(1000, channels, channels, torch.float32)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = with_gradients(exact_inputs, centers.double(), spacing, activation, "torch")
    with torch.autocast(DEVICE, torch.bfloat16):
        got = with_gradients(inputs, centers, spacing, activation, "triton")
    assert got[0].dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in got[1:])
    for a, b in zip(got, exact, strict=True):
        assert (a - b).abs().max() <= 2**-6 * b.abs().max()


@pytest.mark.parametrize("activation", ["softplus", "silu"])
def test_two_runs_are_bitwise_equal(activation):
    inputs, centers, spacing = problem(100, 16, 16, torch.float32)
    runs = [with_gradients(inputs, centers, spacing, activation, "triton") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("activation", ["softplus", "silu"])
def test_opcheck(activation):
    inputs, centers, spacing = problem(15, 16, 20)
    arguments = (*inputs, centers, spacing, activation)
    torch.library.opcheck(op._rbf_embedding, (*arguments, torch.float64))
    detached = [tensor.detach() for tensor in inputs]
    out = rbf_embedding(*detached, centers, spacing, activation, backend="triton")
    value = out if activation == "softplus" else None
    for wants in ((True, True), (False, True)):
        torch.library.opcheck(
            op._rbf_embedding_backward,
            (torch.ones_like(out), value, *detached, centers, spacing, activation, *wants),
        )


def test_errors():
    inputs, centers, spacing = problem(3, 24, 24)
    with pytest.raises(ValueError, match=r"24 channels; the Triton kernels have 16, .* or backend='torch'"):
        rbf_embedding(*inputs, centers, spacing, backend="triton")
    with pytest.raises(ValueError, match="activation = 'relu'; choose one of softplus, silu, None"):
        rbf_embedding(*inputs, centers, spacing, "relu")
