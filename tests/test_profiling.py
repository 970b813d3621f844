"""Ranges: nothing while off, seen by torch.profiler and by NVTX while on."""

import sys
from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mgt_fast import MGT, MGTConfig, build_graph, profiling
from mgt_fast.data import CrystalDataset
from mgt_fast.profiling import layer_ranges, recording, span


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


CONFIG = MGTConfig(task="pretrain", channels=16, num_scalars=8, num_vectors=2, num_blocks=1)
LAYERS = (
    "se3.atom_embedding",
    "se3.edge_embedding",
    "se3.angle_embedding",
    "se3.edges_layer.0",
    "se3.atoms_layer.0",
    "so3.atom_embedding",
    "so3.edge_embedding",
    "so3.equi_update.0",
    "so3.transconv.0",
)


@pytest.fixture(scope="module")
def graph():
    return build_graph(CrystalDataset.open(None).gather(range(4)))


@pytest.fixture
def annotations(monkeypatch):
    """What NVTX is told: "+name" and "-name"."""
    told = []

    class Annotation:
        def __init__(self, name, domain):
            self.name = name

        def __enter__(self):
            told.append(f"+{self.name}")

        def __exit__(self, *_):
            told.append(f"-{self.name}")

    monkeypatch.setattr("nvtx.annotate", Annotation)
    return told


def balanced(told):
    """Whether ranges end in the reverse order of their beginnings."""
    stack = []
    for event in told:
        if event[0] == "+":
            stack.append(event[1:])
        elif stack.pop() != event[1:]:
            return False
    return not stack


def test_layers_have_ranges(graph, annotations):
    model = MGT(CONFIG)
    with recording("nvtx"), layer_ranges(model):
        model(graph)
    assert set(LAYERS) < {event[1:] for event in annotations}
    assert balanced(annotations)
    begun = len(annotations)
    with recording("nvtx"):
        model(graph)
    assert len(annotations) == begun


def test_layers_make_no_ranges_while_off(graph, monkeypatch):
    made = []
    monkeypatch.setattr(profiling, "_traced", made.append)
    monkeypatch.setattr("nvtx.annotate", lambda *args, **kwargs: made.append(args))
    model = MGT(CONFIG)
    model(graph).so3_proj.sum().backward()
    with layer_ranges(model, backward=True):
        model(graph).so3_proj.sum().backward()
    assert made == []


def test_backward_passes_follow_one_another(graph, annotations):
    model = MGT(CONFIG)
    with recording("nvtx"), layer_ranges(model, backward=True):
        out = model(graph)
        forward = len(annotations)
        with span("backward"):
            (out.se3_proj.sum() + out.so3_proj.sum()).backward()
    passes = annotations[forward:]
    assert balanced(passes)
    begun = [event[1:].removesuffix(" backward") for event in passes if event[0] == "+"]
    assert begun.pop(0) == "backward"
    assert set(LAYERS) < set(begun)
    order = [begun.index(name) for name in ("so3.transconv.0", "so3.equi_update.0", "so3.edge_embedding")]
    assert order == sorted(order)
    assert begun.index("so3.edge_embedding") < begun.index("se3.atoms_layer.0")
    # A second backward pass begins anew.
    annotations.clear()
    with recording("nvtx"), layer_ranges(model, backward=True):
        model(graph).se3_proj.sum().backward()
    assert balanced(annotations)


def test_a_range_ends_where_a_layer_fails(graph, annotations):
    model = MGT(CONFIG)
    model.so3_graph_encoder.transconv[0].forward = lambda *_: 1 / 0
    with recording("nvtx"), layer_ranges(model), pytest.raises(ZeroDivisionError):
        model(graph)
    assert balanced(annotations)


def test_layers_computed_again_have_ranges_in_the_backward_pass(graph, annotations):
    model = MGT(CONFIG)
    model.recompute = True
    with recording("nvtx"), layer_ranges(model, backward=True):
        loss = model(graph).so3_proj.sum()
        forward = len(annotations)
        with span("backward"):
            loss.backward()
    passes = annotations[forward:]
    assert balanced(annotations)
    assert "+so3.transconv.0" in passes
    assert "+so3.transconv.0 backward" in passes


def test_ranges_change_no_result(graph):
    model = MGT(CONFIG).eval()
    plain = model(graph).so3_proj
    with recording("nvtx"), layer_ranges(model, backward=True):
        assert model(graph).so3_proj.equal(plain)
