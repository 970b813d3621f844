import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mgt_fast.kernels.gated_attention import gated_sum as module
from mgt_fast.kernels.gated_attention.gated_sum import gated_sum


def naive(pre, query, key, value, norm):
    channels = query.shape[1]
    hidden = F.silu(pre)
    k, v = key(hidden[..., :channels]), value(hidden[..., channels:])
    product = query[:, None] * k / channels**0.5
    return (v * torch.sigmoid(norm(product.flatten(0, 1)).view_as(v))).sum(1)


def problem(num_rows, num_keys, channels=8, dtype=torch.float64):
    torch.manual_seed(num_rows)
    modules = nn.Linear(channels, channels), nn.Linear(channels, channels), nn.BatchNorm1d(channels)
    key, value, norm = (module.to(dtype) for module in modules)
    with torch.no_grad():
        for p in (norm.weight, norm.bias, norm.running_mean):
            p.normal_()
        norm.running_var.uniform_(0.5, 2)
    pre = torch.randn(num_rows, num_keys, 2 * channels, dtype=dtype, requires_grad=True)
    query = torch.randn(num_rows, channels, dtype=dtype, requires_grad=True)
    return pre, query, key, value, norm


def run(function, problem, training):
    pre, query, key, value, norm = problem
    norm.train(training)
    out = function(pre, query, key, value, norm)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    inputs = (pre, query, *key.parameters(), *value.parameters(), *norm.parameters())
    grads = torch.autograd.grad((out * weights).sum(), inputs)
    return out, grads, (norm.running_mean, norm.running_var)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("num_rows", "num_keys"), [(2, 1), (1, 3), (15, 3), (63, 1), (64, 3)])
def test_matches_autograd(num_rows, num_keys, training, monkeypatch):
    monkeypatch.setattr(module, "CPU_CHUNK", 100)  # several chunks and a ragged last one
    out, grads, buffers = run(gated_sum, problem(num_rows, num_keys), training)
    ref_out, ref_grads, ref_buffers = run(naive, problem(num_rows, num_keys), training)
    torch.testing.assert_close(out, ref_out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(grads, ref_grads, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(buffers, ref_buffers, rtol=1e-11, atol=1e-11)


def test_float32_error_is_at_most_twice_plain_torch():
    exact = run(naive, problem(500, 3), True)
    args32 = problem(500, 3)
    args32 = [
        a.detach().float().requires_grad_() if isinstance(a, torch.Tensor) else a.float() for a in args32
    ]
    fused = run(gated_sum, args32, True)
    args32[4].reset_running_stats()
    plain = run(naive, args32, True)
    for name, i in (("out", 0), ("pre", (1, 0)), ("query", (1, 1)), ("key weight", (1, 2))):
        pick = (lambda r: r[0]) if i == 0 else (lambda r, i=i: r[1][i[1]])
        error, bound = ((pick(r).double() - pick(exact)).norm() for r in (fused, plain))
        assert error <= 2 * bound, (name, error, bound)


def test_no_rows():
    *arguments, norm = problem(0, 3)
    assert gated_sum(*arguments, norm.eval()).shape == (0, 8)
