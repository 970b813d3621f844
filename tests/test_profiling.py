"""Ranges: nothing while off, seen by torch.profiler and by NVTX while on."""

import sys
from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mgt_fast import profiling
from mgt_fast.profiling import recording, span


def ranges_of(prof):
    return [event.name for event in prof.events() if event.name.startswith(profiling.DOMAIN)]


def test_off_makes_no_object():
    assert span("a") is span("b")
    with profile(activities=[ProfilerActivity.CPU]) as prof, span("a"):
        torch.ones(1)
    assert ranges_of(prof) == []


def test_trace_holds_nested_ranges():
    with profile(activities=[ProfilerActivity.CPU]) as prof, recording("trace"), span("a"), span("b"):
        torch.ones(1)
    assert ranges_of(prof) == ["mgt_fast/a", "mgt_fast/b"]


def test_off_again_after_an_error():
    with pytest.raises(ZeroDivisionError), recording("trace"):
        1 / 0  # noqa: B018
    assert span("a") is span("b")


def test_nvtx_ranges_are_of_our_domain(monkeypatch):
    made = []

    class Annotation(nullcontext):
        def __init__(self, *args, **kwargs):
            super().__init__()
            made.append((args, kwargs))

    monkeypatch.setattr("nvtx.annotate", Annotation)
    with recording("nvtx"), span("a"):
        pass
    assert made == [(("a",), {"domain": "mgt_fast"})]


def test_missing_nvtx_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ImportError, match="pip install"), recording("nvtx"):
        pass
    assert span("a") is span("b")


def test_unknown_tool():
    with pytest.raises(ValueError, match="'perf'; choose one of trace, nvtx"), recording("perf"):
        pass


@pytest.mark.parametrize("tool", [None, *profiling.TOOLS])
def test_compiles_without_a_break(tool):
    def ranged(x):
        with span("a"):
            return x.sin()

    compiled = torch.compile(ranged, fullgraph=True, backend="eager")
    if tool is None:
        assert compiled(torch.ones(2)).equal(torch.ones(2).sin())
        return
    with recording(tool):
        assert compiled(torch.ones(2)).equal(torch.ones(2).sin())
