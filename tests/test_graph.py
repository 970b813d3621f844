import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from crystals import Crystal, batch_of, described_anew, prototype_structures, prototypes
from safetensors import safe_open
from safetensors.numpy import load_file

from mgt_fast import CrystalBatch, build_graph, neighbor_list
from mgt_fast import graph as graph_module

GOLDEN = Path(__file__).with_name("golden") / "comformer_graphs.safetensors"
with safe_open(GOLDEN, "np") as file:
    CASES = json.loads(file.metadata()["cases"])
STRUCTURES = prototype_structures()
CUBIC = Crystal(np.array([84]), np.zeros((1, 3)), 3.0 * np.eye(3))


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def built(case, compat=None):
    structure = STRUCTURES[case["index"]]
    return build_graph(CrystalBatch.from_structures([structure]), max_neighbors=case["k"], compat=compat)


def multiplicity(edge_index, edge_vec, edge_index_2, edge_vec_2, tolerance=2e-3):
    """For each edge of the first graph: how many edges of the second are the same, within 2e-3 Å."""
    same = (edge_index[:, :, None] == edge_index_2[:, None]).all(0)
    same &= (np.abs(edge_vec[:, None] - edge_vec_2) < tolerance).all(-1)
    return same.sum(1)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['index']}-{c['k']}")
def test_default_edges_are_the_published_set_with_whole_shells(case, golden):
    name, graph = f"{case['index']}.{case['k']}", built(case)
    assert graph.num_edges == case["tolerant_edges"]
    ours = graph.edge_index.numpy(), graph.edge_vec.numpy()
    published = golden[f"{name}.edge_index"], golden[f"{name}.edge_vec"]
    assert (multiplicity(*published, *ours) == 1).all()
    if case["whole_shells"]:
        assert (multiplicity(*ours, *published) >= 1).all()
    else:
        assert graph.num_edges >= case["unique_edges"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['index']}-{c['k']}")
def test_comformer_graphs_are_the_published_multiset_and_frame(case, golden):
    name, graph = f"{case['index']}.{case['k']}", built(case, "comformer")
    assert graph.num_edges == case["edges"]
    ours = graph.edge_index.numpy(), graph.edge_vec.numpy()
    published = golden[f"{name}.edge_index"], golden[f"{name}.edge_vec"]
    np.testing.assert_array_equal(multiplicity(*published, *ours), multiplicity(*published, *published))
    np.testing.assert_allclose(graph.frame[0], golden[f"{name}.frame"], atol=1e-3)


@pytest.mark.parametrize("compat", [None, "comformer"])
def test_fields_agree_with_one_another(compat):
    rng = np.random.default_rng(0)
    batch = batch_of(*[described_anew(c, rng) for _, c in prototypes(16)])
    graph = build_graph(batch, max_neighbors=12, compat=compat)
    i, j = graph.edge_index.numpy()
    np.testing.assert_array_equal(np.repeat(np.arange(graph.num_atoms), graph.row_ptr.diff()), i)
    shift = graph.cell_shift.numpy()
    np.testing.assert_array_equal(np.lexsort((*shift.T[::-1], j, i)), np.arange(len(i)))  # stable: in order
    assert (graph.row_ptr.diff() >= 12).all()
    crystal = graph.batch.numpy()
    np.testing.assert_array_equal(crystal[i], crystal[j])
    frac, cell = batch.frac_coords.numpy(), batch.cell.numpy()
    steps = np.einsum("ea,eab->eb", frac[j] - frac[i] + shift, cell[crystal[i]])
    np.testing.assert_allclose(graph.edge_vec, steps, atol=1e-9)
    assert (torch.linalg.det(graph.frame) > 0).all()
    assert graph.ids == batch.ids
    assert graph.to(dtype=torch.float32).edge_vec.dtype == torch.float32


@pytest.mark.parametrize("compat", [None, "comformer"])
def test_each_edge_has_its_reverse(compat):
    graph = build_graph(batch_of(*[c for _, c in prototypes(16)]), max_neighbors=12, compat=compat)
    i, j = graph.edge_index.numpy()
    shift = graph.cell_shift.numpy()
    backward = np.lexsort((*-shift.T[::-1], i, j))
    np.testing.assert_array_equal(np.stack([j, i])[:, backward], np.stack([i, j]))
    np.testing.assert_array_equal(-shift[backward], shift)


def test_default_graph_is_the_neighbor_list():
    batch = batch_of(*[c for _, c in prototypes(16)])
    graph, neighbors = build_graph(batch), neighbor_list(batch, max_neighbors=25)
    for name in ("edge_index", "edge_vec", "cell_shift", "row_ptr"):
        assert torch.equal(getattr(graph, name), getattr(neighbors, name))


@pytest.mark.parametrize("compat", [None, "comformer"])
def test_the_result_does_not_depend_on_threads_or_on_the_batch(compat):
    crystals = [c for _, c in prototypes(40)][::4]
    one, many = (build_graph(batch_of(*crystals), compat=compat, threads=n) for n in (1, 5))
    for name in ("edge_index", "edge_vec", "cell_shift", "frame", "row_ptr"):
        assert torch.equal(getattr(one, name), getattr(many, name))
    for b, crystal in enumerate(crystals):
        alone = build_graph(batch_of(crystal), compat=compat)
        edges = slice(int(one.row_ptr[one.batch_ptr[b]]), int(one.row_ptr[one.batch_ptr[b + 1]]))
        assert torch.equal(alone.edge_vec, one.edge_vec[edges])
        assert torch.equal(alone.frame[0], one.frame[b])


def test_comformer_lists_edges_between_images_of_an_atom_twice():
    graph = build_graph(batch_of(CUBIC), max_neighbors=6, compat="comformer")
    assert graph.num_edges == 12
    assert len(np.unique(graph.cell_shift, axis=0)) == 6
    torch.testing.assert_close(graph.frame[0].abs().sum(1), torch.full((3,), 3.0, dtype=torch.float64))


def test_comformer_ignores_close_pairs():
    close = Crystal(np.array([84, 3]), np.array([[0, 0, 0], [0.04, 0, 0]]), 3.0 * np.eye(3))  # 0.12 Å apart
    lengths = build_graph(batch_of(close), max_neighbors=2, compat="comformer").edge_vec.norm(dim=1)
    assert lengths.min() > 2.5
    assert build_graph(batch_of(close), max_neighbors=2).edge_vec.norm(dim=1).min() < 0.13


@pytest.mark.parametrize("compat", [None, "comformer"])
def test_crystals_at_fault_are_named(compat):
    broken = CUBIC._replace(frac=np.array([[0, math.nan, 0]]))
    batch = CrystalBatch(**{**vars(batch_of(CUBIC, broken)), "ids": ("mp-1", "mp-2")})
    with pytest.raises(ValueError, match="structure 'mp-2': atom 0: fractional coordinate b is nan"):
        build_graph(batch, compat=compat)
    with pytest.raises(ValueError, match="max_neighbors = 0"):
        build_graph(batch_of(CUBIC), max_neighbors=0, compat=compat)


def test_what_comformer_cannot_build_is_refused():
    with pytest.raises(ValueError, match=r"structure '0': .* needs periodicity in three directions"):
        build_graph(batch_of(CUBIC, pbc=[True, True, False]), compat="comformer")
    with pytest.raises(ValueError, match="compat = 'matformer'; choose None or 'comformer'"):
        build_graph(batch_of(CUBIC), compat="matformer")
    needle = CUBIC._replace(cell=np.diag([2.0, 2.0, 2000.0]))
    with pytest.raises(
        ValueError, match="structure '0': too many images of the cell within its longest vector"
    ):
        build_graph(batch_of(needle), compat="comformer")
    assert build_graph(batch_of(needle)).num_edges > 0


@pytest.mark.parametrize(
    ("device", "compat", "built_on"),
    [("cuda:1", None, "cuda:1"), ("cuda:1", "comformer", "cpu"), ("cpu", None, "cpu")],
)
def test_graphs_for_a_network_are_built_where_it_is(monkeypatch, device, compat, built_on):
    """A stand-in for the device: "moved" crystals and graphs stay and are written down."""
    batch, device = batch_of(CUBIC, CUBIC), torch.device(device)
    places, build = [torch.device("cpu")], graph_module.build_graph

    def move_crystals(crystals, where):
        places.append(where)
        return crystals

    def build_here(crystals, **how):
        expected = {"max_neighbors": 6, "compat": compat, "shell_tolerance": 1e-4, "max_edges": None}
        assert (places[-1], how) == (torch.device(built_on), expected)
        return build(crystals, **how)

    def move_graph(built, *, device, dtype):
        places.append(device)
        return type(built)(**{**vars(built), "edge_vec": built.edge_vec.to(dtype)})

    monkeypatch.setattr(CrystalBatch, "to", move_crystals)
    monkeypatch.setattr(graph_module.CrystalGraph, "to", move_graph)
    monkeypatch.setattr(graph_module, "build_graph", build_here)
    found = graph_module.network_input(batch, device, max_neighbors=6, compat=compat)
    assert places[-1] == device
    assert found.edge_vec.dtype == torch.float32
    assert torch.equal(found.edge_index, build(batch, max_neighbors=6, compat=compat).edge_index)


def test_elements_that_networks_do_not_know_are_told_before_the_device_sees_them(monkeypatch):
    batch = batch_of(
        CUBIC, Crystal(np.array([6, 101]), np.array([[0, 0, 0], [0.5, 0.5, 0.5]]), 4.0 * np.eye(3))
    )
    monkeypatch.setattr(graph_module, "build_graph", None)
    with pytest.raises(ValueError, match=r"structure '1', atom 1: .* number 101; leave the structure out"):
        graph_module.network_input(batch, torch.device("cuda"), max_neighbors=6, compat=None)


def test_shells_as_wide_as_asked_for():
    batch = batch_of(CUBIC)
    k = 5  # of the six nearest, which are equally far
    whole, cut = (build_graph(batch, k, shell_tolerance=tolerance) for tolerance in (1e-4, 0.45))
    assert whole.num_edges == 6 * whole.num_atoms
    assert cut.num_edges == 18 * cut.num_atoms  # with those across the faces' diagonals, 1.41 times as far
    with pytest.raises(ValueError, match=r"shell_tolerance = 1\.5; it must lie in \[0, 1\)"):
        build_graph(batch, k, shell_tolerance=1.5)
    with pytest.raises(ValueError, match=r"shell_tolerance = 0\.01 with compat = 'comformer'"):
        build_graph(batch, k, compat="comformer", shell_tolerance=0.01)
