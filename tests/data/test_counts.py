import io
import json

import numpy as np
import pytest
from ranks import run_ranks
from rich.console import Console
from small_datasets import lattices, write

from mgt_fast.data import CrystalDataset, DatasetError, counts, prepare
from mgt_fast.data.counts import count_edges, edge_counts, require_graphs
from mgt_fast.data.store import MANIFEST
from mgt_fast.distributed import RankError, Ranks
from mgt_fast.graph import SHELL_TOLERANCE, build_graph


@pytest.fixture
def crystals():
    return lattices(23, np.random.default_rng(0))


def edges_one_by_one(dataset, max_neighbors, compat=None):
    graphs = [build_graph(dataset.gather([i]), max_neighbors, compat) for i in range(len(dataset))]
    return [graph.num_edges for graph in graphs]


@pytest.mark.parametrize("compat", [None, "comformer"])
@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_edges_are_counted(tmp_path, monkeypatch, crystals, compat, piece):
    monkeypatch.setattr(counts, "PIECE_ATOMS", piece)
    dataset = CrystalDataset.open(write(tmp_path / "d", crystals))
    found = edge_counts(dataset, 5, compat)
    assert found.dtype == np.int32
    assert found.tolist() == edges_one_by_one(dataset, 5, compat)


def test_edges_of_other_shells(tmp_path, crystals):
    """What is stored belongs to the tolerance it was counted with."""
    wrong = {(5, SHELL_TOLERANCE): np.full(23, 1000, np.int32)}
    dataset = CrystalDataset.open(write(tmp_path / "d", crystals, edge_counts=wrong))
    assert (edge_counts(dataset, 5) == 1000).all()
    exact, wide = (edge_counts(dataset, 5, shell_tolerance=tolerance) for tolerance in (0.0, 0.3))
    for found, tolerance in ((exact, 0.0), (wide, 0.3)):
        graphs = [build_graph(dataset.gather([i]), 5, shell_tolerance=tolerance) for i in range(23)]
        assert found.tolist() == [graph.num_edges for graph in graphs]
    assert (exact <= wide).all()
    assert (exact < wide).any()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_disjoint_and_add_up(tmp_path, monkeypatch, crystals, size):
    monkeypatch.setattr(counts, "PIECE_ATOMS", 7)
    dataset = CrystalDataset.open(write(tmp_path / "d", crystals))
    chosen = np.array([1, 4, 5, 9, 12, 20, 22, 0, 2, 21])  # two parts, one after the other
    shares = [count_edges(dataset, 5, indices=chosen, share=(i, size)) for i in range(size)]
    assert (sum(share > 0 for share in shares) == 1).all()
    assert all(share.any() for share in shares)
    expected = np.zeros(23, np.int32)
    expected[chosen] = sum(shares)
    assert expected[chosen].tolist() == np.array(edges_one_by_one(dataset, 5))[chosen].tolist()
    assert edge_counts(dataset, 5, indices=chosen).tolist() == expected.tolist()


def count_on_rank(rank, folder, broken):
    """Edges of some crystals, how many this rank counted itself, and what went wrong."""
    dataset, counted, own = CrystalDataset.open(folder), [], counts._edges_of

    def edges_of(crystals, *kind):
        counted.extend(crystals.ids)
        if len(crystals) and rank == broken:
            raise OSError("the disk is gone")
        return own(crystals, *kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "_edges_of", edges_of)
        patch.setattr(counts, "PIECE_ATOMS", 7)
        try:
            found = edge_counts(dataset, 5, indices=np.arange(3, 23), ranks=Ranks())
        except (OSError, RankError) as error:
            return type(error).__name__, str(error)
    return found.tolist(), counted


def test_ranks_count_each_crystal_once(tmp_path, crystals):
    folder = write(tmp_path / "d", crystals)
    expected = edges_one_by_one(CrystalDataset.open(folder), 5)
    expected[:3] = [0, 0, 0]
    (first, one), (second, other) = run_ranks(count_on_rank, 2, tmp_path, folder, None)
    assert first == second == expected
    assert one
    assert other
    assert sorted(one + other) == sorted(crystals["ids"][3:])


def test_counting_that_fails_on_one_rank_fails_on_all(tmp_path, crystals):
    folder = write(tmp_path / "d", crystals)
    (kind, text), (other, own) = run_ranks(count_on_rank, 2, tmp_path, folder, 1)
    assert (kind, other) == ("RankError", "OSError")
    assert "rank 1 of 2" in text
    assert own in text


def test_stored_counts_are_read_and_others_counted(tmp_path, monkeypatch, crystals):
    expected = edge_counts(CrystalDataset.open(write(tmp_path / "plain", crystals)), 5)
    key = 5, SHELL_TOLERANCE
    dataset = CrystalDataset.open(write(tmp_path / "d", crystals, edge_counts={key: expected}))
    others = edge_counts(dataset, 6)
    assert (others >= expected).all()
    assert (others > expected).any()
    monkeypatch.setattr(counts, "count_edges", None)
    np.testing.assert_array_equal(edge_counts(dataset, 5), expected)
    with pytest.raises(TypeError):
        edge_counts(dataset, 5, "comformer")


def test_the_bundled_counts_are_right():
    dataset = CrystalDataset.open()
    for max_neighbors in (12, 25):
        assert dataset.stored_edge_counts(max_neighbors, SHELL_TOLERANCE) is not None
        found = count_edges(dataset, max_neighbors)
        np.testing.assert_array_equal(edge_counts(dataset, max_neighbors), found)
        assert found.min() > 0


def test_crystals_without_a_graph_count_nothing_and_are_named(tmp_path, crystals):
    crystals["pbc"][[2, 11, 12, 22]] = False  # of four atoms at most
    key = 5, SHELL_TOLERANCE
    plain = CrystalDataset.open(write(tmp_path / "plain", crystals))
    found = edge_counts(plain, 5)
    assert np.flatnonzero(found == 0).tolist() == [2, 11, 12, 22]
    dataset = CrystalDataset.open(write(tmp_path / "d", crystals, edge_counts={key: found}))
    np.testing.assert_array_equal(edge_counts(dataset, 5), found)
    require_graphs(dataset, found, np.array([0, 1, 3]), 5)
    with pytest.raises(ValueError, match=r"2 of 3 crystals .* max_neighbors = 5.*'crystal-11-é'.*neighbo"):
        require_graphs(dataset, found, np.array([11, 0, 2]), 5)
    with pytest.raises(ValueError, match="'crystal-1-é' is missing, though it has a graph"):
        require_graphs(dataset, np.zeros(23), np.array([1]), 5)


def test_wrong_arguments_are_no_fault_of_the_crystals(tmp_path, crystals):
    dataset = CrystalDataset.open(write(tmp_path / "d", crystals))
    with pytest.raises(ValueError, match="max_neighbors = 0"):
        edge_counts(dataset, 0)
    with pytest.raises(ValueError, match="compat = 'other'"):
        edge_counts(dataset, 5, "other")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda found: found[:-1],
        lambda found: np.roll(found, 1),
        lambda found: found + 1,
        lambda found: -found,
    ],
)
def test_counts_of_other_crystals_are_refused_even_without_hashes(tmp_path, crystals, wrong):
    found = edge_counts(CrystalDataset.open(write(tmp_path / "plain", crystals)), 5)
    folder = write(tmp_path / "d", crystals, edge_counts={(5, SHELL_TOLERANCE): wrong(found)})
    with pytest.raises(DatasetError, match=r"edges-5\.arrow does not hold the edges"):
        CrystalDataset.open(folder, verify=False)


def test_stale_counts_are_refused(tmp_path, crystals):
    key = 5, SHELL_TOLERANCE
    found = edge_counts(CrystalDataset.open(write(tmp_path / "plain", crystals)), 5)
    folder = write(tmp_path / "d", crystals, edge_counts={key: found})
    other = write(tmp_path / "other", crystals, edge_counts={key: found + 2})
    (folder / "edges-5.arrow").write_bytes((other / "edges-5.arrow").read_bytes())
    with pytest.raises(DatasetError, match=r"edges-5\.arrow is damaged or another file"):
        CrystalDataset.open(folder)
    (folder / "edges-5.arrow").unlink()
    with pytest.raises(DatasetError, match=r"edges-5\.arrow is missing"):
        CrystalDataset.open(folder, verify=False)


CIF = """data_salt
_cell_length_a 5.6
_cell_length_b 5.6
_cell_length_c 5.6
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Na Na 0 0 0
Cl Cl 0.5 0.5 0.5
"""
MOLECULE = """2
Lattice="9 0 0 0 9 0 0 0 9" pbc="F F F" Properties=species:S:1:pos:R:3
H 0 0 0
H 0 0 0.74
"""


def test_prepare_stores_counts_and_tells_of_crystals_without_a_graph(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "salt.cif").write_text(CIF)
    (tmp_path / "in" / "hydrogen.xyz").write_text(MOLECULE)
    summary = prepare(tmp_path / "in", tmp_path / "d", workers=1)
    assert any("1 crystals have no graph with 25 neighbours" in note for note in summary.notes)
    dataset = CrystalDataset.open(tmp_path / "d")
    found = dict(zip(dataset.ids, edge_counts(dataset, 25), strict=True))
    assert json.loads((tmp_path / "d" / MANIFEST).read_text())["edge_counts"][0]["max_neighbors"] == 25
    salt = dataset.gather([list(dataset.ids).index("salt")])
    assert sorted(found.values()) == [0, build_graph(salt).num_edges]

    prepare(tmp_path / "in", tmp_path / "one", workers=1, max_neighbors=1)
    assert (CrystalDataset.open(tmp_path / "one").stored_edge_counts(1, SHELL_TOLERANCE) > 0).all()
    prepare(tmp_path / "in", tmp_path / "none", workers=1, max_neighbors=None)
    assert CrystalDataset.open(tmp_path / "none").stored_edge_counts(25, SHELL_TOLERANCE) is None


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown(tmp_path, monkeypatch, crystals, terminal):
    monkeypatch.setattr(counts, "PIECE_ATOMS", 1)
    monkeypatch.setattr(counts, "PLAIN_INTERVAL", 0)
    dataset = CrystalDataset.open(write(tmp_path / "d", crystals))
    console = Console(force_terminal=terminal, file=io.StringIO())
    edge_counts(dataset, 5, console=console)
    text = console.file.getvalue()
    assert "counting edges" in text if terminal else "counted of 23 of 23 crystals" in text
