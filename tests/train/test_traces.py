"""Traces are shared out among ranges: a real one of the CPU, and one written as the GPU's are."""

import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mgt_fast.profiling import recording, span
from mgt_fast.train.traces import IDLE, OTHER, STEPS, Owner, analyse

MAIN, AUTOGRAD = 10, 20


def host(name, start, end, *, tid=MAIN, cat="cpu_op", **args):
    return {"ph": "X", "cat": cat, "name": name, "tid": tid, "ts": start, "dur": end - start, "args": args}


def named(name, start, end, tid=MAIN):
    return host(f"mgt_fast/{name}", start, end, cat="user_annotation", tid=tid)


def launch(start, correlation, tid=MAIN):
    return host("cudaLaunchKernel", start, start + 1, tid=tid, cat="cuda_runtime", correlation=correlation)


def kernel(name, start, end, correlation, cat="kernel", stream=7):
    return host(name, start, end, tid=stream, cat=cat, correlation=correlation)


def link(number, forward, backward):
    return [
        {"ph": phase, "cat": "fwdbwd", "name": "fwdbwd", "id": number, "tid": tid, "ts": start}
        for phase, (tid, start) in (("s", forward), ("f", backward))
    ]


def microseconds(seconds):
    return {owner: pytest.approx(value * 1e6) for owner, value in seconds.items()}


NODE = "autograd::engine::evaluate_function: MmBackward0"
CPU = [
    named(STEPS, 0, 100),
    named("data", 0, 10),
    named("layer", 10, 40),
    host("aten::linear", 12, 30),
    host("aten::mm", 14, 28),
    host("aten::copy_", 16, 18),
    named("backward", 50, 90),
    host(NODE, 52, 70),
    host("MmBackward0", 53, 69),
    host("aten::mm", 54, 64),
    host("aten::add_", 72, 76),
    *link(1, (MAIN, 14), (MAIN, 53)),
    host("aten::mm", 200, 300),  # after the steps
]


def test_moments_of_the_host_belong_to_the_innermost_range():
    found = analyse({"traceEvents": CPU}, {"aten::mm", "aten::copy", "aten::add"})
    assert microseconds(found.host) == {
        Owner("data"): 10,
        Owner("layer"): 30,
        Owner("layer", True): 18,
        Owner("backward", True): 22,
        Owner(OTHER): 20,
    }
    assert found.seconds == pytest.approx(100e-6)
    assert found.device is None


def test_the_outermost_counted_operation_gets_the_time():
    found = analyse({"traceEvents": CPU}, {"aten::mm", "aten::copy", "aten::add"})
    calls = {name: (one.calls, pytest.approx(one.seconds * 1e6)) for name, one in found.operations.items()}
    assert calls == {"aten::mm": (2, 24), "aten::add": (1, 4)}


def test_order_of_the_events_does_not_matter():
    counted = {"aten::mm"}
    assert analyse({"traceEvents": CPU[::-1]}, counted) == analyse({"traceEvents": CPU}, counted)


GPU = [
    named(STEPS, 0, 100),
    named("layer", 0, 20),
    host("aten::mm", 2, 10),
    launch(4, 1),
    launch(12, 2),  # by no counted operation
    named("backward", 20, 60),
    host(NODE, 30, 40, tid=AUTOGRAD),
    host("MmBackward0", 31, 39, tid=AUTOGRAD),
    host("aten::mm", 32, 38, tid=AUTOGRAD),
    launch(33, 3, tid=AUTOGRAD),
    host("autograd::engine::evaluate_function: Other", 42, 48, tid=AUTOGRAD),
    host("Other", 43, 47, tid=AUTOGRAD),
    launch(44, 4, tid=AUTOGRAD),
    launch(50, 5),
    *link(1, (MAIN, 2), (AUTOGRAD, 31)),
    kernel("gemm", 10, 30, 1),
    kernel("search", 30, 35, 2),
    kernel("gemm", 50, 60, 3),
    kernel("scale", 60, 70, 4),
    kernel("ncclDevKernel_AllReduce", 65, 85, 5, stream=9),
    kernel("Memcpy DtoH", 90, 92, 99, cat="gpu_memcpy"),  # of unknown origin
]


def test_kernels_belong_to_the_range_that_started_them():
    found = analyse({"traceEvents": GPU}, {"aten::mm"})
    assert microseconds(found.device) == {
        Owner("layer"): 25,
        Owner("layer", True): 10,
        Owner("backward", True): 5,  # the moment both streams work is the later kernel's
        Owner("communication"): 20,
        Owner(OTHER): 2,
        Owner(IDLE): 38,
    }
    assert sum(found.host.values()) == pytest.approx(100e-6)
    assert microseconds(found.host)[Owner("backward", True)] == 40


def test_operations_have_their_kernels():
    operations = analyse({"traceEvents": GPU}, {"aten::mm"}).operations
    product = operations["aten::mm"]
    assert (product.calls, product.seconds) == (2, pytest.approx(30e-6))
    assert {name: one.calls for name, one in product.kernels.items()} == {"gemm": 2}
    assert operations["search"].calls == 1
    assert operations["search"].seconds == pytest.approx(5e-6)
    assert set(operations) == {"aten::mm", "search", "scale", "ncclDevKernel_AllReduce", "Memcpy DtoH"}


def test_backward_passes_in_a_real_trace(tmp_path):
    weight = torch.ones(64, 64, requires_grad=True)
    x = torch.ones(64, 64)
    path = str(tmp_path / "trace.json")
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as prof, recording("trace"), span(STEPS):
        with span("first"):
            y = (x @ weight).sigmoid()
        with span("second"):
            z = (y @ weight).sum()
        with span("backward"):
            z.backward()
    prof.export_chrome_trace(path)
    with open(path) as file:
        found = analyse(json.load(file), {"aten::mm"})
    assert set(found.host) == {
        Owner("first"),
        Owner("second"),
        Owner("first", True),
        Owner("second", True),
        Owner("backward", True),
        Owner(OTHER),
    }
    assert sum(found.host.values()) == pytest.approx(found.seconds)
    assert found.operations["aten::mm"].calls == 2 + 3  # the input needs no gradient


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="no range 'mgt_fast/steps'"):
        analyse({"traceEvents": [named("data", 0, 1)]}, ())
