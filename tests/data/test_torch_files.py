"""Pickles of tensors: moduli as Matformer published them, and the graphs of AdsMT."""

import io
import pickle
import sys
import tarfile
import types

import numpy as np
import pytest
import torch

from mgt_fast.data import CrystalDataset, PrepareError, prepare

lmdb = pytest.importorskip("lmdb")


def item(number, value):
    atoms = {
        "lattice_mat": [[4.0 + number, 0, 0], [0, 4, 0], [0, 0, 4]],
        "coords": [[0, 0, 0], [2, 2, 2]],
        "elements": ["Na", "Cl"],
        "cartesian": True,
    }
    return {"id": f"mp-{number}", "atoms": atoms, "bulk modulus": value}


def read(path, format, tmp_path, **options):
    summary = prepare(path, tmp_path / "dataset", format=format, workers=0, max_neighbors=None, **options)
    return CrystalDataset.open(tmp_path / "dataset"), summary


@pytest.mark.parametrize("protocol", [2, 4])
def test_targets_may_be_tensors_of_one_number(tmp_path, protocol):
    values = [torch.tensor(1.5), torch.tensor([2.5]), np.float64(3.5), 4.5, torch.ones(2)]
    path = tmp_path / "bulk_megnet_train.pkl"
    path.write_bytes(pickle.dumps([item(i, v) for i, v in enumerate(values)], protocol=protocol))
    dataset, summary = read(path, "tensor-pickle", tmp_path, targets={"bulk modulus": "K"})
    assert summary.by_reason == {"target_not_a_number": 1}
    assert list(dataset.ids) == ["mp-0", "mp-1", "mp-2", "mp-3"]
    assert dataset.targets["K"].tolist() == [1.5, 2.5, 3.5, 4.5]


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [([Evil()], r"asks for builtins\.print"), ({"a": 1}, "holds a dict, not a list"), (b"", "EOFError")],
)
def test_a_pickle_of_anything_else_is_refused(tmp_path, content, message, capsys):
    path = tmp_path / "moduli.pkl"
    path.write_bytes(content if content == b"" else pickle.dumps(content))
    with pytest.raises(PrepareError, match=message):
        read(path, "tensor-pickle", tmp_path)
    assert capsys.readouterr().out == ""


@pytest.fixture
def geometric(monkeypatch):
    """The two classes that PyTorch Geometric 2 pickles a graph with; they are gone when it is read."""
    module = types.ModuleType("torch_geometric.data.data")
    classes = [type(name, (), {"__module__": module.__name__}) for name in ("Data", "GlobalStorage")]
    for one in classes:
        setattr(module, one.__name__, one)
    for name in ("torch_geometric", "torch_geometric.data", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    return classes


def graph(geometric, sid, energy, version=2, **more):
    """A graph of two atoms on a slab of its own."""
    data, store = (one() for one in geometric)
    values = {
        "pos": torch.zeros(1, 3),
        "atomic_numbers": torch.tensor([78.0]),
        "gmae_pos": torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]]),
        "gmae_atom_numb": torch.tensor([78.0, 8.0]),
        "cell": torch.diag(torch.tensor([4.0, 4.0, 20.0]))[None],
        "sid": sid,
        "y_relaxed": energy,
        "ads_smi": "O",
    } | more
    values = {key: value for key, value in values.items() if value is not None}
    if version == 1:
        data.__dict__.update(values)
    else:
        store._mapping, data._store = values, store
    return data


def database(path, graphs):
    with lmdb.open(str(path), subdir=False, map_size=2**20) as env, env.begin(write=True) as writer:
        for key, one in enumerate(graphs):
            writer.put(str(key).encode(), pickle.dumps(one, protocol=-1))
        writer.put(b"length", pickle.dumps(len(graphs)))
    return path


def test_graphs_are_read_in_their_order_without_their_library(tmp_path, geometric, monkeypatch):
    graphs = [graph(geometric, f"s{i}", 0.5 * i, version=1 + i % 2) for i in range(12)]
    graphs[3] = graph(geometric, "s3", torch.tensor([1.5]))
    graphs[4] = graph(geometric, "s4", 2.0, gmae_pos=None)
    path = database(tmp_path / "data.lmdb", graphs)
    for name in [name for name in sys.modules if name.startswith("torch_geometric")]:
        monkeypatch.delitem(sys.modules, name)
    dataset, summary = read(path, "gmae", tmp_path, targets={"y_relaxed": "energy"})
    order = [i for i in range(12) if i != 4]
    assert list(dataset.ids) == [f"s{i}" for i in order]
    assert dataset.targets["energy"].tolist() == [0.5 * i for i in order]
    rejects = (tmp_path / "dataset" / "rejects.csv").read_text()
    assert 'graph 4,data.lmdb-4,unreadable_record,4,"the graph has no gmae_pos; it has pos' in rejects
    crystal = dataset.gather([0])
    assert crystal.numbers.tolist() == [78, 8]
    np.testing.assert_allclose(crystal.frac_coords @ crystal.cell[0], [[0, 0, 0], [0, 0, 2]], atol=1e-12)
    assert summary.read == 12


def test_a_packed_database_is_found_among_other_files(tmp_path, geometric):
    path = database(tmp_path / "data.lmdb", [graph(geometric, 7, 1.0)])
    with tarfile.open(tmp_path / "Alloy-GMAE.tar.gz", "w:gz") as archive:
        archive.add(path, "Alloy-GMAE/raw/data.lmdb")
        note = tarfile.TarInfo("Alloy-GMAE/README")
        note.size = 2
        archive.addfile(note, io.BytesIO(b"hi"))
    dataset, summary = read(tmp_path / "Alloy-GMAE.tar.gz", "gmae", tmp_path, targets=["y_relaxed"])
    assert list(dataset.ids) == ["7"]
    assert any("README" in text for text in summary.notes)


def test_what_is_no_database_is_refused(tmp_path):
    (tmp_path / "data.lmdb").write_bytes(bytes(4096))
    with pytest.raises(PrepareError, match="is no LMDB database"):
        read(tmp_path / "data.lmdb", "gmae", tmp_path)
