"""`gated_attention` of both backends against plain autograd, and how each behaves beside it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mgt_fast.kernels.batch_norm import BatchNorm
from mgt_fast.kernels.gated_attention import (
    _backward_keys,
    _backward_values,
    _keys,
    _values,
    gated_attention,
    reference,
)
from mgt_fast.kernels.gated_attention import triton as kernels
from mgt_fast.kernels.launch import watch_launches
from mgt_fast.kernels.segments import Segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
C = 16
on_both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


class Problem:
    """Random inputs over random rows; differentiable by everything."""

    def __init__(self, num_edges, num_keys, *, shared=0, near=0, channels=C, dtype=torch.float64):
        torch.manual_seed(num_edges)
        like = {"dtype": torch.float64, "device": DEVICE}
        modules = nn.Linear(channels, channels), nn.Linear(channels, channels), BatchNorm(channels)
        self.key, self.value, self.norm = (module.to(**like) for module in modules)
        with torch.no_grad():
            for p in (self.norm.weight, self.norm.bias, self.norm.running_mean):
                p.normal_()
            self.norm.running_var.uniform_(0.5, 2)
        pick = lambda count, n: Segments(torch.randint(n, (count,), device=DEVICE), n)  # noqa: E731
        self.x_rows = pick(num_edges * num_keys, shared) if shared else None
        self.near_rows = pick(num_edges, near) if near else None
        self.far_rows, self.count = pick(num_edges, 3), None
        x = (shared, channels) if shared else (num_edges, num_keys, channels)
        shapes = (x, (2 * channels, channels), (near or num_edges, 3 * channels), (3, num_keys, 2 * channels))
        self.tensors = [torch.randn(shape, **like).requires_grad_() for shape in shapes]
        if dtype != torch.float64:
            self.tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in self.tensors]
            for module in modules:
                module.to(dtype)

    def run(self, training, backend):
        """Output, gradients and running statistics of one call; "autograd" is the formula as it stands."""
        self.norm.train(training)
        function = self.autograd if backend == "autograd" else self.call
        out = function(*self.tensors, backend)
        out = out if self.count is None else out[: self.count]
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=DEVICE).view_as(out)
        modules = (self.key, self.value, self.norm)
        inputs = (*self.tensors, *(p for module in modules for p in module.parameters()))
        return out, torch.autograd.grad((out * weights).sum(), inputs), dict(self.norm.named_buffers())

    def call(self, x, weight, near, far, backend):
        rows = {"near_rows": self.near_rows, "far_rows": self.far_rows, "x_rows": self.x_rows}
        modules = {"key": self.key, "value": self.value, "norm": self.norm}
        return gated_attention(x, weight, near, far=far, **rows, **modules, count=self.count, backend=backend)

    def pad(self, num_edges):
        """Add edges that do not count, of other numbers."""
        real, num_keys = self.far_rows.index.shape[0], self.tensors[3].shape[1]
        more = lambda rows, n, size: Segments(  # noqa: E731
            torch.cat((rows.index, torch.randint(n, (size,), device=DEVICE))), n
        )
        self.count = torch.tensor(real, device=DEVICE)
        self.far_rows = more(self.far_rows, 3, num_edges)
        for i, own in ((0, self.x_rows is None), (2, self.near_rows is None)):
            if own:
                tensor = self.tensors[i].detach()
                extra = 2 * torch.randn_like(tensor[:1].expand(num_edges, *tensor.shape[1:]))
                self.tensors[i] = torch.cat((tensor, extra)).requires_grad_()
        if self.x_rows is not None:
            self.x_rows = more(self.x_rows, self.x_rows.num_segments, num_edges * num_keys)
        if self.near_rows is not None:
            self.near_rows = more(self.near_rows, self.near_rows.num_segments, num_edges)
        return self

    def autograd(self, x, weight, near, far, _):
        num_keys, channels = far.shape[1], near.shape[1] // 3
        if self.x_rows is not None:
            x = x[self.x_rows.index].view(-1, num_keys, channels)
        near = near if self.near_rows is None else near[self.near_rows.index]
        hidden = F.silu(x @ weight.t() + near[:, None, channels:] + far[self.far_rows.index])
        k, v = self.key(hidden[..., :channels]), self.value(hidden[..., channels:])
        product = near[:, None, :channels] * k / channels**0.5
        return (v * torch.sigmoid(self.norm(product.flatten(0, 1)).view_as(v))).sum(1)


@on_both_backends
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("num_edges", "num_keys", "rows"),
    [
        (2, 1, {}),
        (1, 3, {}),
        (15, 3, {"near": 4}),
        (63, 1, {"near": 9}),
        (64, 3, {"shared": 20}),
        (50, 1, {"near": 5, "shared": 60}),
    ],
)
def test_matches_autograd(num_edges, num_keys, rows, training, backend, monkeypatch):
    monkeypatch.setattr(reference, "CPU_CHUNK", 300)  # several chunks and a ragged last one
    out, grads, buffers = Problem(num_edges, num_keys, **rows).run(training, backend)
    expected, expected_grads, expected_buffers = Problem(num_edges, num_keys, **rows).run(
        training, "autograd"
    )
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(buffers, expected_buffers, rtol=1e-11, atol=1e-11)


@on_both_backends
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("num_edges", "num_keys", "rows"), [(15, 3, {}), (33, 1, {"near": 4}), (20, 3, {"near": 5, "shared": 9})]
)
def test_edges_that_do_not_count_change_nothing(num_edges, num_keys, rows, training, backend, monkeypatch):
    monkeypatch.setattr(reference, "CPU_CHUNK", 300)  # some chunks without an edge that counts
    padded = Problem(num_edges, num_keys, **rows).pad(50)
    out, grads, buffers = padded.run(training, backend)
    expected, expected_grads, expected_buffers = Problem(num_edges, num_keys, **rows).run(training, backend)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(buffers, expected_buffers, rtol=1e-11, atol=1e-11)
    for grad, real in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad[: len(real)], real, rtol=1e-9, atol=1e-10)
        assert not grad[len(real) :].any()


@pytest.mark.parametrize("training", [True, False])
def test_keys_of_an_edge_are_summed_on_the_chip(training, monkeypatch):
    apart = Problem(50, 3).run(training, "triton")
    monkeypatch.setattr(kernels, "FOLDED", (torch.float64,))
    torch.testing.assert_close(Problem(50, 3).run(training, "triton"), apart, rtol=1e-9, atol=1e-10)


@on_both_backends
@pytest.mark.parametrize("training", [True, False])
def test_float32_error_is_at_most_twice_plain_torch(training, backend):
    exact, fused, plain = (
        Problem(100, 3, channels=32, dtype=dtype).run(training, how)
        for dtype, how in (
            (torch.float64, "autograd"),
            (torch.float32, backend),
            (torch.float32, "autograd"),
        )
    )
    # The key's bias stands before a normalisation that takes it away again: its gradient is rounding.
    names = ("out", "x", "weight", "near", "far", "key weight", None, "value weight", "value bias")
    for name, *values in zip(names, *((r[0], *r[1]) for r in (exact, fused, plain)), strict=False):
        if name:
            error, bound = ((value.double() - values[0]).norm() for value in values[1:])
            assert error <= 2 * bound, (name, error, bound)


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter gets bfloat16 wrong")
def test_bfloat16_error_is_at_most_twice_plain_torch():
    exact = Problem(2000, 3, channels=256).run(True, "autograd")
    with torch.autocast(DEVICE, torch.bfloat16):
        runs = [
            Problem(2000, 3, channels=256, dtype=torch.float32).run(True, how)
            for how in ("triton", "autograd")
        ]
    for i, values in enumerate(zip(*((r[0], *r[1][:6]) for r in (exact, *runs)), strict=True)):
        error, bound = ((value.double() - values[0]).norm() for value in values[1:])
        assert error <= 2 * bound, (i, error, bound)


def test_without_gradients_nothing_is_kept():
    problem = Problem(40, 3, shared=10)
    with torch.no_grad():
        out = problem.norm.eval() and problem.call(*problem.tensors, "torch")
    torch.testing.assert_close(
        out, Problem(40, 3, shared=10).run(False, "autograd")[0], rtol=1e-11, atol=1e-11
    )
    assert out.grad_fn is None


def test_two_runs_are_bitwise_equal():
    runs = [Problem(63, 3, near=7).run(True, "triton") for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_the_kernels_run():
    with watch_launches() as seen:
        Problem(15, 3).run(True, "triton")
    names = [launch.name for launch in seen]
    assert names == [
        "keys_kernel",
        "values_kernel",
        "backward_values_kernel",
        "backward_keys_kernel",
        "_sum_rows_kernel",
    ]


@on_both_backends
def test_one_row_has_no_statistics(backend):
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        Problem(1, 1).run(True, backend)


def test_channels_without_tiles_are_named():
    with pytest.raises(ValueError, match="24 channels; the Triton kernels have 16, 32,"):
        Problem(4, 1, channels=24).run(True, "triton")


@pytest.mark.parametrize(("num_keys", "near", "count", "statistics"), [(2, 0, None, True), (1, 3, 5, False)])
def test_registration(num_keys, near, count, statistics):
    problem = Problem(6, num_keys, near=near)
    x, weight, near, far = (tensor.detach() for tensor in problem.tensors)
    modules = (problem.key, problem.value, problem.norm)
    key_w, key_b, value_w, value_b, norm_w, norm_b = (p.detach() for m in modules for p in m.parameters())
    near_index = None if problem.near_rows is None else problem.near_rows.index
    count = None if count is None else torch.tensor(count, device=DEVICE)
    rows = (x, weight, near, near_index, far, problem.far_rows.index)
    torch.library.opcheck(_keys, (*rows, key_w, key_b, statistics, count))
    keys = _keys(*rows, key_w, key_b, statistics, count)[0]
    normalising = (keys, problem.norm.running_mean, problem.norm.running_var.rsqrt(), norm_w, norm_b)
    torch.library.opcheck(_values, (*rows, value_w, value_b, *normalising))
    grad = _values(*rows, value_w, value_b, *normalising)
    rooms = (x.new_zeros(6, 3 * C), x.new_zeros(6 * num_keys, 2 * C) if num_keys > 1 else None)
    inputs = (grad, *rooms, *rows, value_w, value_b, *normalising)
    torch.library.opcheck(_backward_values, inputs)
    grad_norm, _, sums = _backward_values(*inputs)
    statistics = (*normalising[:-1], sums[:2])
    torch.library.opcheck(_backward_keys, (grad_norm, *rooms, *rows, key_w, *statistics, count))
