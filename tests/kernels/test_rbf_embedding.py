import pytest
import torch

from mgt_fast.kernels.rbf_embedding import rbf_embedding


def dense(x, weight, bias, centers, spacing):
    basis = torch.exp(-(((x[:, None] - centers) / spacing) ** 2))
    return basis @ weight.t() + bias


def problem(num_rows, num_centers, low=-4.0, high=4.0):
    generator = torch.Generator().manual_seed(num_rows)
    centers = torch.linspace(low, high, num_centers, dtype=torch.float64)
    # A quarter wider than the centres' range on both sides: noisy cosines leave [-1, 1].
    x = (torch.rand(num_rows, generator=generator, dtype=torch.float64) * 1.5 - 0.25) * (high - low) + low
    weight = torch.randn(5, num_centers, generator=generator, dtype=torch.float64)
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    return x, weight, bias, centers, float(centers[1] - centers[0])


@pytest.mark.parametrize("num_rows", [0, 1, 15, 63])
@pytest.mark.parametrize("num_centers", [4, 13, 64, 256])
def test_local_support_equals_dense_basis(num_rows, num_centers):
    arguments = problem(num_rows, num_centers)
    torch.testing.assert_close(rbf_embedding(*arguments), dense(*arguments), rtol=1e-13, atol=1e-13)


def test_far_outside_only_the_bias_is_left():
    _, weight, bias, centers, spacing = problem(1, 64)
    far = torch.tensor([-1e6, 1e6, -float("inf")], dtype=torch.float64)
    torch.testing.assert_close(rbf_embedding(far, weight, bias, centers, spacing), bias.expand(3, -1))


def test_gradients():
    x, weight, bias, centers, spacing = problem(6, 20)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: rbf_embedding(*a, centers, spacing), (x, weight, bias))
