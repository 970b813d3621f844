import csv
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mgt_fast import CrystalBatch, build_graph
from mgt_fast.checkpoint import CheckpointMeta
from mgt_fast.config import MGTConfig
from mgt_fast.data import CrystalDataset, DatasetWriter
from mgt_fast.data.store import record_batch
from mgt_fast.inference import (
    NUMBERS_PER_EDGE,
    PredictionTable,
    TooLargeError,
    predict_dataset,
    predict_graphs,
    predict_paths,
    predict_structures,
)
from mgt_fast.model import MGT

SIZES = {"channels": 8, "num_scalars": 4, "num_vectors": 2, "num_blocks": 1, "expert_hidden": 4}
SALT = np.array([[0, 0, 0], [0.5, 0.5, 0.5]])


def network(**settings):
    torch.manual_seed(0)
    model = MGT(MGTConfig(**SIZES, **settings))
    model.meta = CheckpointMeta(model=model.config, max_neighbors=6, target="gap", unit="eV")
    return model


def salts(n):
    from ase import Atoms

    return [Atoms("NaCl", scaled_positions=SALT, cell=np.eye(3) * (3 + 0.1 * i), pbc=True) for i in range(n)]


@pytest.fixture
def dataset(tmp_path):
    """Five salts; one of an element without features, one with two atoms on one spot."""
    coords, numbers = [SALT] * 5, [np.array([11, 17])] * 5
    numbers[1], coords[3] = np.array([11, 118]), np.zeros((2, 3))
    with DatasetWriter(tmp_path / "salts", {}) as writer:
        writer.write(
            record_batch(
                [f"salt-{i}" for i in range(5)],
                numbers,
                coords,
                np.eye(3)[None] * np.linspace(3, 4, 5)[:, None, None],
                np.ones((5, 3), bool),
                [""] * 5,
                {},
            )
        )
    return CrystalDataset.open(tmp_path / "salts")


def test_target_scaling_is_undone():
    model = network()
    plain = predict_structures(model, salts(3))
    model.meta = CheckpointMeta(model=model.config, max_neighbors=6, target_mean=10.0, target_std=2.0)
    np.testing.assert_allclose(predict_structures(model, salts(3)).prediction, 10 + 2 * plain.prediction)


def test_graphs_are_those_of_the_checkpoint(monkeypatch):
    import mgt_fast.graph as graph

    asked = []
    build = graph.build_graph
    monkeypatch.setattr(graph, "build_graph", lambda *a, **kw: asked.append(kw) or build(*a, **kw))
    model = network()
    kinds = [
        {"max_neighbors": 9, "compat": "comformer", "shell_tolerance": 1e-4},
        {"max_neighbors": 5, "compat": None, "shell_tolerance": 0.01},
    ]
    for kind in kinds:
        model.meta = CheckpointMeta(model=model.config, **kind)
        predict_structures(model, salts(1))
    assert asked == [kind | {"max_edges": None} for kind in kinds]


def test_mode_of_the_network_is_left_as_it_was():
    model = network()
    running = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    for training in (True, False):
        model.train(training)
        predict_structures(model, salts(2))
        assert model.training == training
    assert running
    assert all(torch.equal(model.get_buffer(name), value) for name, value in running.items())


def test_ids_and_partial_batches():
    table = predict_structures(network(), salts(5), ids=list("abcde"), batch_size=2)
    assert table.ids == ("a", "b", "c", "d", "e")
    whole = predict_structures(network(), salts(5))
    np.testing.assert_allclose(table.prediction, whole.prediction, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table.contributions, whole.contributions, rtol=1e-4)


def test_one_bad_crystal_does_not_stop_the_others(dataset):
    table, rejects = predict_dataset(network(), dataset, batch_size=4)
    assert table.ids == ("salt-0", "salt-2", "salt-4")
    assert [reject.id for reject in rejects] == ["salt-1", "salt-3"]
    assert (
        "structure 'salt-1', atom 1: there are no CGCNN features for atomic number 118" in rejects[0].message
    )
    assert "salt-3" in rejects[1].message


def test_a_crystal_too_large_for_the_memory_is_left_out(dataset, tmp_path):
    """Room for a single salt: they are predicted one by one, and a larger crystal is refused."""
    from ase.io import write

    folder = tmp_path / "in"
    folder.mkdir()
    small, large = salts(1)[0], salts(1)[0].repeat(3)
    for name, atoms in (("a", small), ("b", large), ("c", small)):
        write(folder / f"{name}.cif", atoms)
    memory = NUMBERS_PER_EDGE * 8 * 4 * 100  # 100 edges of 8 channels
    table, rejects = predict_paths(network(), [folder], workers=0, memory=memory)
    assert table.ids == ("a", "c")
    (reject,) = rejects
    assert (reject.id, reject.reason) == ("b", "too_large")
    assert "to predict b with 324 edges takes about" in reject.message
    with pytest.raises(
        TooLargeError, match=r"GiB are allowed; predict fewer crystals at a time.*--memory-gib"
    ):
        predict_structures(network(), [small, large], memory=memory)


def test_what_a_prediction_takes_of_the_memory():
    def peak():
        status = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

    rng = np.random.default_rng(0)
    batch = CrystalBatch.from_arrays(np.full(800, 14), rng.random((800, 3)), [21 * np.eye(3)], [800])
    graph = build_graph(batch, max_neighbors=25).to(dtype=torch.float32)
    model = MGT(MGTConfig(channels=128, num_scalars=32, num_vectors=8))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    predict_graphs(model, [graph])
    numbers = (peak() - before) / (graph.num_edges * 128 * 4)
    assert NUMBERS_PER_EDGE / 3 < numbers < NUMBERS_PER_EDGE


def test_a_non_finite_prediction_names_the_crystal():
    model = network()
    model.meta = CheckpointMeta(model=model.config, max_neighbors=6)
    with torch.no_grad():
        model.so3_projection_encoder.fc.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="predictions are not finite for b"):
        predict_structures(model, salts(1), ids=["b"])


def test_nothing_to_predict():
    with pytest.raises(ValueError, match="no crystals to predict"):
        predict_structures(network(), [])


def test_a_pretrained_network_does_not_predict():
    with pytest.raises(ValueError, match="predicts no property yet"):
        predict_structures(network(task="pretrain"), salts(1))


def test_concatenated_views_have_no_contributions(tmp_path):
    table = predict_structures(network(fusion="concat"), salts(2))
    assert table.contributions is None
    assert list(table.columns()) == ["id", "prediction gap [eV]"]


@pytest.mark.parametrize(
    "target", ["id", "part", "target", "reference", "prediction", "se3_contribution", None]
)
@pytest.mark.parametrize("outputs", [1, 2])
def test_no_name_of_a_target_hides_a_column(target, outputs):
    reference, prediction = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    predictions = prediction if outputs == 1 else np.stack([prediction, prediction + 2], axis=1)
    table = PredictionTable(("a", "b"), predictions, np.array([[0.25, 0.75], [1, 0]]), target)
    columns = list(table.columns(reference, "val").values())
    expected = [["a", "b"], ["val", "val"], [1, 2], [3, 4], [5, 6], [0.25, 1], [0.75, 0]]
    del expected[3 + outputs : 5]
    assert [column.tolist() for column in columns] == expected


def test_a_single_structure_is_no_list_of_atoms():
    atoms = salts(1)[0]
    with pytest.raises(TypeError, match="structures is a single Atoms; pass a list"):
        predict_structures(network(), atoms)
    from pymatgen.core import Structure

    structure = Structure(atoms.cell[:], atoms.numbers.tolist(), SALT)
    with pytest.raises(TypeError, match="structures is a single Structure; pass a list"):
        predict_structures(network(), structure)


@pytest.mark.parametrize("ids", [["a"], ["a", "b", "c", "d"]])
def test_as_many_ids_as_structures(ids):
    with pytest.raises(ValueError, match=f"{len(ids)} ids were given for 3 structures"):
        predict_structures(network(), salts(3), ids=ids, batch_size=3)


def test_files_of_one_name_are_all_predicted(tmp_path):
    crystals = dict(zip(["a/POSCAR", "b/POSCAR", "c/salt.vasp"], salts(3), strict=True))
    for name, atoms in crystals.items():
        (tmp_path / name).parent.mkdir()
        atoms.write(tmp_path / name, format="vasp")
    paths = [tmp_path / name for name in crystals]
    table, rejects = predict_paths(network(), [*paths, paths[0]], workers=0)
    assert table.ids == (str(paths[0]), str(paths[1]), "salt")
    assert rejects == []
    np.testing.assert_allclose(
        table.prediction, predict_structures(network(), salts(3)).prediction, rtol=1e-4, atol=1e-5
    )


def test_datasets_that_share_names_are_all_predicted(dataset, tmp_path):
    shutil.copytree(tmp_path / "salts", tmp_path / "again")
    table, rejects = predict_paths(network(), [tmp_path / "salts", tmp_path / "again"])
    assert table.ids == tuple(
        f"{tmp_path / name}: salt-{i}" for name in ("salts", "again") for i in (0, 2, 4)
    )
    assert len(rejects) == 4


def test_several_outputs_become_several_columns():
    table = predict_structures(network(output_dim=2), salts(2))
    assert table.prediction.shape == (2, 2)
    assert list(table.columns())[:3] == ["id", "prediction gap [eV] 0", "prediction gap [eV] 1"]


def test_tables_are_written_as_csv_and_parquet(tmp_path):
    table = PredictionTable(
        ("a", "b,c"), np.array([1.5, -1e-9]), np.array([[0.25, 0.75], [1, 0]]), "gap", "eV"
    )
    for name in ("t.csv", "t.parquet"):
        table.write(tmp_path / name)
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[1] == {
        "id": "b,c",
        "prediction gap [eV]": "-1e-9",
        "se3_contribution": "1",
        "so3_contribution": "0",
    }
    assert pq.read_table(tmp_path / "t.parquet").to_pydict() == {
        "id": ["a", "b,c"],
        "prediction gap [eV]": [1.5, -1e-9],
        "se3_contribution": [0.25, 1.0],
        "so3_contribution": [0.75, 0.0],
    }
    with pytest.raises(ValueError, match=r"written as \.csv or \.parquet, not as \.xlsx"):
        table.write(tmp_path / "t.xlsx")
