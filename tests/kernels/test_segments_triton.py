import pytest
import torch

from mgt_fast.kernels import segment_sum as op
from mgt_fast.kernels.launch import watch_launches
from mgt_fast.kernels.segments import Segments, gather_rows, segment_mean, segment_sum

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rows per segment: empty ones, one row, more than a block of rows, no rows at all, no segments at all.
SIZES = [[3, 0, 17, 4], [1], [0, 0, 300], [0, 0], []]


def ragged(sizes, shuffled):
    index = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    if shuffled:
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))]
        return Segments(index.to(DEVICE), len(sizes))
    return Segments(index.to(DEVICE), len(sizes), torch.tensor([0, *sizes], device=DEVICE).cumsum(0))


def rows(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(DEVICE, dtype).requires_grad_()


def with_gradient(function, x, segments, backend):
    y = function(x, segments, backend=backend)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=DEVICE).view_as(y)
    return y, *torch.autograd.grad((y * weight).sum(), x)


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("columns", [1, 5, 16, 130])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_reference(sizes, columns, shuffled):
    segments = ragged(sizes, shuffled)
    for function in (segment_sum, segment_mean, gather_rows):
        x = rows(len(sizes) if function is gather_rows else sum(sizes), columns)
        with watch_launches() as launches:
            got = with_gradient(function, x, segments, "triton")
        assert [launch.name for launch in launches] == ["_sum_rows_kernel"]
        for a, b in zip(got, with_gradient(function, x, segments, "torch"), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    segments = ragged([3, 0, 1, 4], shuffled=True)
    for function, n in ((segment_sum, 8), (segment_mean, 8), (gather_rows, 4)):
        assert torch.autograd.gradcheck(lambda x, f=function: f(x, segments, backend="triton"), rows(n, 2))


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
def test_no_less_accurate_than_torch(dtype):
    segments = ragged([200, 0, 17, 3], shuffled=True)
    x = rows(220, 16, dtype=dtype).detach()
    exact = segment_sum(x.double(), segments)
    got, torch_got = (segment_sum(x, segments, backend=backend) for backend in ("triton", "torch"))
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= 2 * (torch_got - exact).abs().max()


def test_two_runs_are_bitwise_equal():
    segments = ragged([200, 0, 17, 3], shuffled=True)
    x = rows(220, 40, dtype=torch.float32)
    assert torch.equal(segment_sum(x, segments, backend="triton"), segment_sum(x, segments, backend="triton"))


def test_opcheck():
    segments = ragged([3, 0, 1, 4], shuffled=True)
    torch.library.opcheck(op._sum_rows, (rows(8, 5).detach(), segments.order, segments.ptr))
