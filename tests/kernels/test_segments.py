import pytest
import torch

from mgt_fast.kernels.segments import (
    Segments,
    gather_rows,
    segment_apply,
    segment_mean,
    segment_outer,
    segment_sum,
)

# Rows per segment; empty segments, one row, no rows at all.
SIZES = [[3, 0, 1, 4], [1], [0, 0, 5], [0, 0]]


def ragged(sizes, shuffled):
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    if shuffled:
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))]
        return Segments(index, len(sizes))
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    return Segments(index, len(sizes), ptr)


def rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_sums_and_outer_products_match_a_loop(sizes, shuffled):
    segments = ragged(sizes, shuffled)
    n, e = len(sizes), sum(sizes)
    x, h, t, z = rows(n, 4), rows(e, 4, seed=1), rows(e, 3, seed=2), rows(n, 4, 3, seed=3)
    members = [torch.nonzero(segments.index == i).flatten() for i in range(n)]

    assert torch.equal(gather_rows(x, segments), x[segments.index])
    expected = torch.stack([h[m].sum(0) for m in members])
    torch.testing.assert_close(segment_sum(h, segments), expected)
    torch.testing.assert_close(
        segment_mean(h, segments), expected / torch.tensor([[max(s, 1)] for s in sizes])
    )
    torch.testing.assert_close(segment_outer(h, t, segments), torch.stack([h[m].T @ t[m] for m in members]))
    torch.testing.assert_close(
        segment_apply(h, z, segments), torch.einsum("ek,eku->eu", h, z[segments.index])
    )


@pytest.mark.parametrize("shuffled", [False, True])
def test_gradients(shuffled):
    segments = ragged([3, 0, 1, 4], shuffled)
    h, t, z = rows(8, 3), rows(8, 2, seed=1), rows(4, 3, 2, seed=2)
    assert torch.autograd.gradcheck(lambda a: gather_rows(a, segments), rows(4, 2))
    assert torch.autograd.gradcheck(lambda a: segment_sum(a, segments), h)
    assert torch.autograd.gradcheck(lambda a, b: segment_outer(a, b, segments), (h, t))
    assert torch.autograd.gradcheck(lambda a, b: segment_apply(a, b, segments), (h, z))


def test_means_of_short_numbers_are_long():
    segments = ragged([300], shuffled=False)
    y = torch.linspace(0, 1, 300, dtype=torch.bfloat16)[:, None].requires_grad_()
    mean = segment_mean(y, segments)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean[0, 0].double(), y.double().mean(), rtol=1e-6, atol=0)
    assert torch.autograd.grad(mean.sum(), y)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("types", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_factors_of_two_types_meet_under_autocast(types):
    segments = ragged([3, 0, 1, 4], shuffled=True)
    h, t, z = rows(8, 3), rows(8, 2, seed=1), rows(4, 3, 2, seed=2)
    for function, inputs in ((segment_outer, (h, t)), (segment_apply, (h, z))):
        exact = function(*inputs, segments)
        narrow = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(inputs, types, strict=True)]
        with torch.autocast("cpu", torch.bfloat16):
            out = function(*narrow, segments)
        torch.testing.assert_close(out.double(), exact, atol=0.05, rtol=0.02)
        gradients = torch.autograd.grad(out.sum(), narrow)
        for gradient, expected in zip(gradients, torch.autograd.grad(exact.sum(), inputs), strict=True):
            torch.testing.assert_close(gradient.double(), expected, atol=0.05, rtol=0.02)
